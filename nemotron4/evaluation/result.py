"""A result: the numbers of one task with everything that decides whether two of them may be compared."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from nemotron4.errors import DataError
from nemotron4.evaluation.task import Metric, Outcome, Task
from nemotron4.grading.statistics import Interval
from nemotron4.json_form import HIDDEN, JsonForm, named, read_fields, to_json
from nemotron4.records import JsonObject, read_json_lines, write
from nemotron4.report import Block, Table, Text
from nemotron4.runs import write_json

RESULT_FILE = "result.json"
ITEMS_FILE = "items.jsonl"
SHOWN_REASONS = 6


def sha256_of(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def grader_sha256(own_code: str) -> str:
    """Hash of the source of all graders and of the task's own code: another grader is another number."""
    digest = hashlib.sha256(own_code.encode())
    for package in ("nemotron4.grading", "nemotron4.evaluation.tasks"):
        for file in sorted(resources.files(package).iterdir(), key=lambda entry: entry.name):
            if file.name.endswith((".py", ".json")):
                digest.update(f"{package}/{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Result(JsonForm):
    """One scored task. ``name`` is the task's, with the judge appended where it is not the card's."""

    task: str
    name: str
    metrics: Mapping[str, Metric] = field(metadata=HIDDEN)
    num_items: int
    unscored: Mapping[str, int] = field(metadata=named("unscored_reasons"))
    unparsed: int
    data_sha256: str
    data_is_standard: bool
    prompt_sha256: str
    grader_sha256: str
    seed: int
    created_at: str = ""  # when it was scored, UTC
    example_sha256: Mapping[str, str] = field(default_factory=dict)  # other files without an expected hash
    isolation: str | None = None
    model: str | None = None
    judge: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    usage: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    epochs: int = 1
    items: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict, metadata=HIDDEN)
    reasons: Mapping[str, str] = field(default_factory=dict, metadata=HIDDEN)  # item -> why it has its score
    extra = "ignore"

    def to_json(self) -> JsonObject:
        """The object that ``--json`` prints. Items are written to a file of their own."""
        metrics = self.metrics.items()
        return {
            **super().to_json(),
            "metrics": {name: metric.value for name, metric in metrics},
            "numerators": {name: metric.numerator for name, metric in metrics},
            "denominators": {name: metric.denominator for name, metric in metrics},
            "intervals": {name: to_json(metric.interval) for name, metric in metrics if metric.interval},
            "unscored": sum(self.unscored.values()),
            "reasons": dict(Counter(reason for text in self.reasons.values() for reason in text.split("; "))),
        }

    def identity(self) -> dict[str, Any]:
        """What must agree before two results are compared. The model is what may differ."""
        return {
            "name": self.name,
            "data_sha256": self.data_sha256,
            "example_sha256": dict(self.example_sha256),
            "prompt_sha256": self.prompt_sha256,
            "grader_sha256": self.grader_sha256,
            "sampling": dict(self.sampling),
            "seed": self.seed,
            "judge": self.judge,
            "epochs": self.epochs,
        }


def make_result(task: Task, outcome: Outcome, **more: Any) -> Result:
    notes = tuple(note for note in (task.note, *outcome.notes) if note)
    return Result(
        task=task.name,
        metrics=outcome.metrics,
        unscored=outcome.unscored,
        unparsed=outcome.unparsed,
        items=outcome.items,
        reasons=outcome.reasons,
        prompt_sha256=sha256_of(task.prompt),
        grader_sha256=grader_sha256(task.own_code),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=notes,
        **more,
    )


def result_name(task: Task, judge: str | None, *, is_cut_by_context: bool = False) -> str:
    """Another judge than the card's, other settings, answers cut by the context: the name says it."""
    changes = [f"{name} {value}" for name, value in task.changed.items()]
    if task.judge is not None and judge != task.card_judge:
        changes.append(f"judge {judge or 'not named'}")
    if is_cut_by_context:
        changes.append("cut by the context")
    return f"{task.name} ({', '.join(changes)})" if changes else task.name


def save(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys((*result.items, *result.reasons))
    rows = ({"id": name, **result.items.get(name, {}), "reason": result.reasons.get(name)} for name in names)
    write(folder / ITEMS_FILE, rows)
    write_json(folder / RESULT_FILE, result.to_json())


def load_result(folder: Path) -> Result:
    """A saved result; DataError if the folder holds none (a run that has not ended, or something else)."""
    path = folder / RESULT_FILE
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        items = {str(item.pop("id")): item for _, item in read_json_lines(folder / ITEMS_FILE)}
        reasons = {name: reason for name, item in items.items() if (reason := item.pop("reason", None))}
        scored = {name: item for name, item in items.items() if item}
        metrics = {
            name: Metric(
                value,
                row["numerators"][name],
                row["denominators"][name],
                Interval(**row["intervals"][name]) if name in row["intervals"] else None,
            )
            for name, value in row["metrics"].items()
        }
        result: Result = read_fields(Result, row, metrics=metrics, items=scored, reasons=reasons)
        return result
    except OSError as error:
        inside = ", ".join(str(found.parent) for found in sorted(folder.glob(f"*/{RESULT_FILE}")))
        hint = f"it holds {inside}" if inside else "a run that was stopped has no result: run it again"
        raise DataError(f"{path}: cannot be read: {error.strerror}", hint=hint) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a result of this version: {error!r}") from error


def number(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.2f}"


def fraction(metric: Metric) -> str:
    if metric.numerator is None or metric.denominator is None:
        return ""
    return f"{metric.numerator:g}/{metric.denominator:g}"


def result_blocks(result: Result, task: Task) -> list[Block]:
    """The result for a reader: every metric with its interval, its fraction and the card's value."""
    card = task.card if result.name == result.task else {}
    rows = []
    for name, metric in result.metrics.items():
        span = metric.interval
        shown = "" if span is None else f"[{span.lower:.2f}, {span.upper:.2f}]"
        published = f"{card[name]:g}" if name in card else ""
        rows.append([name, number(metric.value), shown, fraction(metric), published])
    reasons = ", ".join(f"{count} {reason}" for reason, count in result.unscored.items())
    lines = [f"unscored {sum(result.unscored.values())}" + (f" ({reasons})" if reasons else "")]
    if result.unparsed:
        lines.append(f"unparsed {result.unparsed} (counted as wrong)")
    if counts := result.to_json()["reasons"]:
        most = sorted(counts.items(), key=lambda pair: -pair[1])[:SHOWN_REASONS]
        lines.append("reasons " + ", ".join(f"{count} {reason}" for reason, count in most))
    lines += [*_provenance(result, task), *(f"note: {note}" for note in result.notes)]
    columns = ["metric", "value", "95 % interval", "fraction", "card"]
    return [
        Text(f"{result.name}: {result.num_items} items", is_verdict=True),
        Table(columns, rows),
        *map(Text, lines),
    ]


def _cost(usage: Mapping[str, float]) -> list[str]:
    """One line; the seconds are of all requests together, of which many ran at once."""
    said = []
    for prefix, who in (("", ""), ("judge_", "judge: ")):
        named = (
            ("prompt_tokens", "tokens in"),
            ("completion_tokens", "tokens out"),
            ("duration_s", "request seconds"),
        )
        found = [f"{usage[prefix + key]:,.0f} {words}" for key, words in named if usage.get(prefix + key)]
        said += [who + ", ".join(found)] if found else []
    return ["; ".join(said)] if said else []


def _provenance(result: Result, task: Task) -> list[str]:
    """Who was measured, what it cost, and what must agree before two results are compared."""
    who = f"model {result.model or 'not named'}"
    who += f"; judge {result.judge or 'not named'}" if task.judge is not None else ""
    who += f"; {json.dumps(dict(result.sampling))}" if result.sampling else ""
    who += f"; seed {result.seed}" + (f"; sample of {result.limit}" if result.limit else "")
    who += f"; code in {result.isolation}" if result.isolation else ""
    lines = [who]
    lines += _cost(result.usage)
    standard = "" if result.data_is_standard else " (not the standard file)"
    lines.append(
        f"sha256: data {result.data_sha256[:12]}{standard}, prompt {result.prompt_sha256[:12]},"
        f" grader {result.grader_sha256[:12]}"
    )
    return lines
