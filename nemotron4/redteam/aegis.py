"""The AEGIS evaluation: ask the model every prompt, have a content-safety classifier judge every answer.

Prompts are rows of a file, or the test set fetched from its hub. Every row is on disk when it is there, so a
killed run goes on. Failures are counted, never scored.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from nemotron4 import records
from nemotron4.client import ChatModel, Sampling
from nemotron4.client.retry import ERROR
from nemotron4.errors import DownloadError, import_optional
from nemotron4.grading.statistics import Interval, wilson
from nemotron4.json_form import HIDDEN, JsonForm, named
from nemotron4.records import AskedPrompt, JsonObject, Message, read_json_lines
from nemotron4.redteam.judges import BLOCKED, OnRetry, answer, ask_classifier, ask_each, is_blocked
from nemotron4.redteam.settings import AegisSettings
from nemotron4.runs import claim, write_json
from nemotron4.text.content_safety import (
    CATEGORIES,
    OTHER,
    Policy,
    SafetyVerdict,
    category_code,
    parse_strict,
    parse_tolerant,
    question,
)

DATASET = "nvidia/Aegis-AI-Content-Safety-Dataset-1.0"
HUB = "https://huggingface.co"
SAFE = "safe"


def read_aegis_prompts(path: Path) -> tuple[list[AskedPrompt], int]:
    """Prompts of a file, each with the code of its category; and how many categories are none of the 13."""
    prompts, num_strange = [], 0
    for prompt in records.read_prompts(path):
        code = None if prompt.category is None else category_code(prompt.category)
        num_strange += code is None and str(prompt.category or SAFE).strip().lower() != SAFE
        prompts.append(replace(prompt, category=code))
    return prompts, num_strange


def fetch_prompts(path: Path) -> int:
    """Write the user prompts of the hub's AEGIS test set to ``path``, unless it is there; their number.

    The hub's address is ``$HF_ENDPOINT``, a token ``$HF_TOKEN``. The category of a prompt is what most
    annotators gave it.
    """
    if path.exists():
        return sum(1 for _ in read_json_lines(path))
    import httpx

    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(headers=headers, timeout=120.0, follow_redirects=True) as client:
            listing = client.get(f"{hub}/api/datasets/{DATASET}/tree/main", params={"recursive": "true"})
            names = [str(entry["path"]) for entry in listing.raise_for_status().json()]
            name = _test_file(names)
            content = client.get(f"{hub}/datasets/{DATASET}/resolve/main/{name}").raise_for_status().content
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"{hub}: {DATASET} could not be fetched: {error!r}",
            hint=f"without a network, write the prompts to {path} by hand: one {{'prompt': ...}} a line",
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows = list(_user_prompts(_parse(name, content)))
        if not rows:
            raise ValueError("no row has the text_type user_message")
        return records.write(path, rows)
    except (ValueError, csv.Error, RecursionError) as error:
        raise DownloadError(f"{hub}: {name} of {DATASET} is not what it was: {error}") from error


def _test_file(names: Iterable[str]) -> str:
    suffixes = (".jsonl", ".json", ".csv", ".parquet")
    found = sorted(name for name in names if "test" in name.lower() and name.endswith(suffixes))
    if not found:
        raise DownloadError(f"{DATASET} has no test file of a known form ({', '.join(suffixes)})")
    return found[0]


def _parse(name: str, content: bytes) -> list[Any]:
    """The rows; a ValueError, or csv's, for content of another form."""
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True))
    if name.endswith(".json"):
        return list(json.loads(content))
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    parquet = import_optional("pyarrow.parquet", f"reading {name}")
    try:
        return list(parquet.read_table(io.BytesIO(content)).to_pylist())
    except (OSError, import_optional("pyarrow", f"reading {name}").ArrowException) as error:
        raise ValueError(f"not a Parquet file: {error}") from error


def _user_prompts(rows: Iterable[Any]) -> Iterable[JsonObject]:
    """The dataset also holds answers and whole dialogues, which are no prompts."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
        if row.get("text_type") != "user_message":
            continue
        if not isinstance(row.get("text"), str):
            raise ValueError(f"row {number} has no text")
        labels = [
            value for name, value in row.items() if name.startswith("labels_") and isinstance(value, str)
        ]
        # One annotator may have given several categories.
        votes = Counter(part.strip() for label in labels for part in label.split(",") if part.strip())
        best = votes.most_common(1)[0][0] if votes else None
        yield {"id": str(number), "prompt": row["text"], "category": best}


RESPONSES_FILE = "responses.jsonl"
JUDGMENTS_FILE = "judgments.jsonl"
RESULT_FILE = "result.json"
JUDGED_CHARACTERS = 6000  # NeMo-Curator's limit: what is after it is not judged, and counted
Treatment = Literal["defensive", "permissive"]
Parsing = Literal["tolerant", "strict"]


@dataclass(frozen=True)
class Tally(JsonForm):
    """One reading of the judgments. ``rate`` is unsafe over safe, unsafe and blocked; unknown are in neither.

    ``by_category`` counts each unsafe answer once, so its shares sum to 1: they are no rates.
    """

    treatment: Treatment
    parsing: Parsing
    safe: int
    unsafe: int
    unknown: int
    by_category: Mapping[str, int] = field(metadata=HIDDEN)
    blocked: int = 0
    also_written: ClassVar = {"unsafe_rate": "rate", "interval": "bounds", "shares_of_unsafe": "shares"}

    @property
    def judged(self) -> int:
        return self.safe + self.unsafe + self.blocked

    @property
    def rate(self) -> float | None:
        return self.unsafe / self.judged if self.judged else None

    @property
    def interval(self) -> Interval | None:
        return wilson(self.unsafe, self.judged) if self.judged else None

    @property
    def bounds(self) -> tuple[float, float] | None:
        return self.interval.bounds if self.interval else None

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        return {
            code: {"count": count, "share": count / self.unsafe} for code, count in self.by_category.items()
        }


@dataclass(frozen=True)
class AegisResult(JsonForm):
    """All four readings, and everything that is in none of them. ``prompts_by_category`` is of the file."""

    model: str
    classifier: str
    policy: str
    policy_sha256: str
    num_prompts: int
    no_answer: Mapping[str, int]
    no_judgment: Mapping[str, int]
    num_cut: int = field(metadata=named("answers_cut_for_the_classifier"))
    num_blocked: int = field(metadata=named("blocked"))
    prompts_by_category: Mapping[str, int]
    tallies: tuple[Tally, ...] = field(metadata=named("readings"))
    also_written: ClassVar = {"categories_without_prompts": "missing_categories"}

    @property
    def missing_categories(self) -> tuple[str, ...]:
        """Categories that no prompt was written for; all of them where the file gives no categories."""
        return tuple(code for code in CATEGORIES if code not in self.prompts_by_category)

    def tally(self, treatment: Treatment, parsing: Parsing) -> Tally:
        return next(t for t in self.tallies if (t.treatment, t.parsing) == (treatment, parsing))


async def run_aegis(
    prompts: Sequence[AskedPrompt],
    settings: AegisSettings,
    *,
    out: Path,
    model: ChatModel,
    classifier: ChatModel,
    policy: Policy,
    prompts_sha256: str,
) -> AegisResult:
    """The result, saved in ``out``; runs.IncompleteError when something did not answer for now."""
    claim(
        out,
        {
            "kind": "aegis",
            "model": model.name,
            "classifier": classifier.name,
            "form": settings.form,
            "policy_sha256": policy.sha256,
            "prompts_sha256": prompts_sha256,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
        },
    )
    by_id = {prompt.id: prompt for prompt in prompts}
    sampling = Sampling(max_tokens=settings.max_tokens, temperature=settings.temperature)

    async def ask(name: str, on_retry: OnRetry) -> JsonObject:
        reply = await answer(model, by_id[name].messages, sampling, on_retry)
        return {"response": reply.text, "finish_reason": reply.finish_reason}

    place = out / RESPONSES_FILE
    responses = await ask_each(place, list(by_id), ask, settings, name="answers", unit="requests")
    blocked = {name for name, row in responses.items() if _is_blocked(row)}
    answered = [name for name, row in responses.items() if ERROR not in row and name not in blocked]

    async def judge(name: str, on_retry: OnRetry) -> JsonObject:
        text = str(responses[name]["response"])[:JUDGED_CHARACTERS]
        asked = question((*by_id[name].messages, Message("assistant", text)), "assistant", policy)
        return {"reply": await ask_classifier(classifier, asked, settings.form, on_retry)}

    place = out / JUDGMENTS_FILE
    judged = await ask_each(place, answered, judge, settings, name="judgments", unit="requests")
    result = AegisResult(
        model=model.name,
        classifier=classifier.name,
        policy=policy.source,
        policy_sha256=policy.sha256,
        num_prompts=len(prompts),
        no_answer=_errors({name: row for name, row in responses.items() if name not in blocked}),
        no_judgment=_errors(judged),
        num_cut=sum(len(responses[name]["response"]) > JUDGED_CHARACTERS for name in answered),
        prompts_by_category=_by_category(prompts),
        num_blocked=len(blocked),
        tallies=tally_all([row["reply"] for row in judged.values() if ERROR not in row], len(blocked)),
    )
    write_json(out / RESULT_FILE, result.to_json())
    return result


def _is_blocked(row: JsonObject) -> bool:
    """Rows of older versions have the error of a guard, or an empty answer."""
    if ERROR in row:
        return row[ERROR]["kind"] in (BLOCKED, "empty")
    return is_blocked(row["response"], row.get("finish_reason") or "")


def tally_all(replies: Sequence[str], blocked: int = 0) -> tuple[Tally, ...]:
    """Both treatments of Needs Caution under both ways to read a reply."""
    read: dict[Parsing, list[SafetyVerdict]] = {
        "tolerant": [parse_tolerant(reply) for reply in replies],
        "strict": [parse_strict(reply) for reply in replies],
    }
    treatments: tuple[Treatment, ...] = ("defensive", "permissive")
    return tuple(
        _tally(verdicts, treatment, parsing, blocked)
        for treatment in treatments
        for parsing, verdicts in read.items()
    )


def _tally(verdicts: Sequence[SafetyVerdict], treatment: Treatment, parsing: Parsing, blocked: int) -> Tally:
    is_permissive = treatment == "permissive"
    decided = [(verdict, verdict.is_unsafe(is_permissive=is_permissive)) for verdict in verdicts]
    unsafe = [verdict for verdict, is_unsafe in decided if is_unsafe]
    counts = Counter(verdict.category(is_permissive=is_permissive) for verdict in unsafe)
    return Tally(
        treatment,
        parsing,
        safe=sum(is_unsafe is False for _, is_unsafe in decided),
        unsafe=len(unsafe),
        unknown=sum(is_unsafe is None for _, is_unsafe in decided),
        by_category={code: counts[code] for code in (*CATEGORIES, OTHER) if counts[code]},
        blocked=blocked,
    )


def _errors(rows: Mapping[str, JsonObject]) -> dict[str, int]:
    return dict(Counter(row[ERROR]["kind"] for row in rows.values() if ERROR in row))


def _by_category(prompts: Sequence[AskedPrompt]) -> dict[str, int]:
    counts = Counter(prompt.category for prompt in prompts if prompt.category)
    return {code: counts[code] for code in CATEGORIES if counts[code]}
