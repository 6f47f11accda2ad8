"""Score stored answers. A live run ends with the same call, so both give the same number.

responses: ``{"id", "response"}``; a multi-turn task has a list of texts, or one row per ``turn``; where
numbers are scored (rewards, log-probabilities of choices) the response is a list of numbers. ``epoch`` (from
1) tells repeated answers to one item apart; ``finish_reason`` and ``clipped_to`` are read where they are.
judgments: ``{"id", "turn" or "game", "text"}``, or log-probabilities or a stored preference (AlpacaEval).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemotron4.errors import ConfigError, DataError, Nemotron4Error, nearest
from nemotron4.evaluation.data import Content, DataSource, unpack
from nemotron4.evaluation.failures import (
    FailedRequests,
    OnFailure,
    judgment_name,
    request_name,
    stopped,
    with_failures,
    wrong_items,
)
from nemotron4.evaluation.result import Result, make_result, result_name
from nemotron4.evaluation.task import (
    Inputs,
    Item,
    Judgment,
    Outcome,
    Task,
    choose,
    combine_epochs,
    load_items,
    share,
)
from nemotron4.grading.repetition import is_looping
from nemotron4.grading.sandbox import open_sandbox
from nemotron4.records import JsonObject

RESPONSES_FILE = "responses.jsonl"
JUDGMENTS_FILE = "judgments.jsonl"
FAILURES_FILE = "failures.jsonl"
SAMPLES_FILE = "samples.jsonl"  # which log of the viewer shows which ids

CUT, LOOPING, EMPTY = "cut at the limit", "looping", "no answer text"


@dataclass(frozen=True)
class ItemResponse:
    """The texts of one item, one per turn, and how each ended where that is known."""

    texts: tuple[str, ...]
    finish_reasons: tuple[str | None, ...] = ()
    clipped_to: int | None = None

    @classmethod
    def of_row(cls, row: JsonObject) -> ItemResponse:
        """A row that a run wrote."""
        return cls(_tuple(row["response"]), _tuple(row.get("finish_reason")), row.get("clipped_to"))

    @property
    def reasons(self) -> list[str]:
        """What an answer's end says of it, whatever its score."""
        found = []
        for text, finish in zip(self.texts, self.finish_reasons or (None,) * len(self.texts), strict=False):
            found += [CUT] if finish == "length" else []
            found += [LOOPING] if is_looping(text, finish) else []
            found += [] if text.strip() else [EMPTY]
        return list(dict.fromkeys(found))


Responses = Mapping[str, ItemResponse]


def with_wrong(
    items: Sequence[Item], epochs: Sequence[Responses], failures: FailedRequests
) -> list[dict[str, ItemResponse]]:
    """With an empty answer for each failed request that counts as a wrong one, in the items' order."""
    found = [dict(responses) for responses in epochs]
    for epoch, item in wrong_items(items, len(epochs), failures):
        found[epoch - 1].setdefault(item.id, ItemResponse(("",) * (1 + len(item.follow_ups))))
    return [{item.id: responses[item.id] for item in items if item.id in responses} for responses in found]


def score_task(
    task: Task,
    items: Sequence[Item],
    epochs: Sequence[Responses],
    judgments: Sequence[Judgment],
    source: DataSource,
    failures: FailedRequests,
    *,
    seed: int = 0,
    allow_unsafe: bool = False,
    judge: str | None = None,
    **more: Any,
) -> Result:
    """The result of a task over these items; ``epochs`` holds one mapping of answers for each epoch."""
    epochs = with_wrong(items, epochs, failures)
    sandbox = open_sandbox(allow_unsafe=allow_unsafe) if task.needs_sandbox else None
    outcomes = []
    for responses in epochs:
        texts = {name: response.texts for name, response in responses.items()}
        inputs = Inputs(
            items=items, responses=texts, judgments=judgments, source=source, seed=seed, sandbox=sandbox
        )
        outcomes.append(_with_ends(task, task.score(inputs), responses))
    outcome = outcomes[0] if len(outcomes) == 1 else combine_epochs(outcomes, seed=seed)
    every = [response for responses in epochs for response in responses.values()]
    is_cut_by_context = any(response.clipped_to and CUT in response.reasons for response in every)
    content = source.main(task.main_file)
    result = make_result(
        task,
        replace(outcome, notes=(*outcome.notes, *_clip_notes(every))),
        name=result_name(task, judge, is_cut_by_context=is_cut_by_context),
        num_items=len(items),
        epochs=len(epochs),
        data_sha256=content.sha256,
        data_is_standard=content.is_expected,
        example_sha256={
            file.path: source.read(file).sha256
            for file in task.files[1:]
            if file.sha256 is None and source.find(file) is not None
        },
        isolation=None if sandbox is None else sandbox.isolation,
        seed=seed,
        judge=judge,
        **more,
    )
    return with_failures(result, failures, is_judged=task.judge is not None)


def _with_ends(task: Task, outcome: Outcome, responses: Responses) -> Outcome:
    """With the share of looping answers as a metric, and how each answer ended among its reasons."""
    if not task.is_generative or not responses:
        return outcome
    reasons = dict(outcome.reasons)
    num_looping = 0
    for name, response in responses.items():
        ends = response.reasons
        num_looping += LOOPING in ends
        if ends:
            reasons[name] = "; ".join([*([reasons[name]] if name in reasons else []), *ends])
    metrics = {**outcome.metrics, "looping": share(num_looping, len(responses))}
    return replace(outcome, metrics=metrics, reasons=reasons)


def _clip_notes(responses: Sequence[ItemResponse]) -> list[str]:
    clipped = [response for response in responses if response.clipped_to]
    if not clipped:
        return []
    num_cut = sum(CUT in response.reasons for response in clipped)
    least = min(response.clipped_to or 0 for response in clipped)
    return [
        f"{len(clipped)} of {len(responses)} requests got fewer new tokens than the benchmark gives (at least"
        f" {least}), because the context leaves no more; {num_cut} answers were cut by that"
    ]


def require_scored(result: Result) -> None:
    """A result in which nothing could be scored is an error, not a number."""
    by_item = (value for item in result.items.values() for value in item.values())
    metrics = (metric.value for name, metric in result.metrics.items() if name != "looping")
    if any(value is not None for value in (*metrics, *by_item)):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in result.unscored.items()) or "no items"
    raise Nemotron4Error(
        f"{result.name}: nothing was scored: {reasons}",
        hint="read the answers, and failures.jsonl in the folder of a run",
    )


def score_files(
    task: Task,
    source: DataSource,
    *,
    responses: Path | None,
    judgments: Path | None,
    failures: Path | None = None,
    on_failure: OnFailure | None = None,
    limit: int | None = None,
    seed: int = 0,
    allow_unsafe: bool = False,
    model: str | None = None,
    judge: str | None = None,
) -> Result:
    """Score what is on disk, without any model. ``failures`` are by default those next to the answers."""
    if task.judge is not None and judgments is None:
        raise ConfigError(f"{task.name} is scored by a judge", hint="pass --judgments FILE")
    if task.judge is None and judgments is not None:
        raise ConfigError(f"{task.name} has no judge", hint="leave --judgments out")
    if responses is None and task.needs_responses:
        raise ConfigError(f"{task.name} is scored from answers", hint="pass --responses FILE")
    items = load_items(task, source)
    epochs, num_outside = read_responses(responses, items, task.is_outside) if responses else ([{}], 0)
    beside = None if responses is None else responses.with_name(FAILURES_FILE)
    if failures is None and beside is not None and beside.is_file():
        failures = beside
    drawn = choose(items, limit=limit, seed=seed)
    found = FailedRequests(on_failure=on_failure or task.on_failure)
    if failures is not None:
        found = read_failures(failures, task, items, drawn, epochs, found.on_failure)
    ids = {item.id for item in drawn}
    result = score_task(
        task,
        drawn,
        [{name: each for name, each in answers.items() if name in ids} for answers in epochs],
        [each for each in (read_judgments(judgments, items) if judgments else []) if each.id in ids],
        source,
        found,
        limit=limit,
        seed=seed,
        allow_unsafe=allow_unsafe,
        model=model,
        judge=judge,
    )
    if not num_outside:
        return result
    return replace(result, notes=(*result.notes, f"{num_outside} answers to tasks outside this set left out"))


# Files that anyone may have written


def read_responses(
    path: Path, items: Sequence[Item], is_outside: Callable[[str], bool]
) -> tuple[list[dict[str, ItemResponse]], int]:
    """Answers by item id for each epoch, and the number of rows left out as ``is_outside`` of the task's set.

    Other unknown ids and repeated ids are errors.
    """
    known = {item.id: item for item in items}
    num_outside = 0
    turns: dict[tuple[int, str], dict[int, tuple[str, str | None, int | None]]] = {}
    for number, row in _rows(path):
        name = _read_id(path, number, row)
        if name not in known:
            if not is_outside(name):
                raise _unknown_id(path, number, name, known)
            num_outside += 1
            continue
        texts = _texts(row, f"{path}:{number}")
        first, epoch = (_from_one(row, field, f"{path}:{number}") for field in ("turn", "epoch"))
        ends = (*_tuple(row.get("finish_reason")), *(None,) * len(texts))  # not known of each turn
        by_turn = turns.setdefault((epoch, name), {})
        for turn, (text, finish) in enumerate(zip(texts, ends, strict=False), start=first):
            if turn in by_turn:
                raise DataError(f"{path}:{number}: id {name!r} is answered twice")
            by_turn[turn] = text, finish, row.get("clipped_to")
    numbers = {epoch for epoch, _ in turns}
    if numbers and max(numbers) > len(numbers):
        raise DataError(
            f"{path}: has epoch {max(numbers)}, but {len(numbers)} epochs; expected 1, 2 and so on"
        )
    epochs: list[dict[str, ItemResponse]] = [{} for _ in numbers or (1,)]
    for (epoch, name), by_turn in turns.items():
        expected = 1 + len(known[name].follow_ups)
        if sorted(by_turn) != list(range(1, expected + 1)):
            raise DataError(f"{path}: id {name!r} has turns {sorted(by_turn)}; expected 1 to {expected}")
        texts, ends, clips = zip(*(by_turn[turn] for turn in sorted(by_turn)), strict=True)
        epochs[epoch - 1][name] = ItemResponse(texts, ends, clips[0])
    return epochs, num_outside


def read_failures(
    path: Path,
    task: Task,
    items: Sequence[Item],
    drawn: Sequence[Item],
    epochs: Sequence[Responses],
    on_failure: OnFailure,
) -> FailedRequests:
    """Failed requests of a run about the ``drawn`` items, but for those answered since."""
    known = {item.id: item for item in items}
    asked = [
        request_name(item.id, epoch)
        for epoch, answers in enumerate(epochs, start=1)
        for item in drawn
        if item.id not in answers
    ]
    judged = [judgment_name(item.id, part) for item in drawn for part in (1, 2)]
    wanted, kinds = {*asked, *judged}, dict[str, str]()
    for number, row in _rows(path):
        name = _read_id(path, number, row)
        kind = row.get("kind")
        if not isinstance(kind, str):
            raise DataError(f"{path}:{number}: field 'kind' is {kind!r}; expected a text")
        if name not in known and (whole := re.sub(r"(~\d+|#\d+)$", "", name)) not in known:
            raise _unknown_id(path, number, whole, known)
        if name in wanted and on_failure == "stop":
            raise stopped(task, name, str(row.get("message", kind)))
        kinds[name] = kind
    responses, judgments = (
        {name: kinds[name] for name in names if name in kinds} for names in (asked, judged)
    )
    return FailedRequests(on_failure=on_failure, responses=responses, judgments=judgments)


def read_judgments(path: Path, items: Sequence[Item]) -> list[Judgment]:
    """Judgments in file order. A part judged twice is an error: which one counts is not ours to choose."""
    known = {item.id: item for item in items}
    judgments: dict[tuple[str, int], Judgment] = {}
    for number, row in _rows(path):
        name = _read_id(path, number, row)
        if name not in known:
            raise _unknown_id(path, number, name, known)
        part = row.get("turn", row.get("game", 1))
        if part not in (1, 2) or isinstance(part, bool):
            raise DataError(f"{path}:{number}: turn or game is {part!r}; expected 1 or 2")
        if (name, part) in judgments:
            raise DataError(f"{path}:{number}: id {name!r}, part {part} is judged twice")
        text = row.get("text") or ""
        if not isinstance(text, str):
            raise DataError(f"{path}:{number}: field 'text' is not a text")
        judgments[name, part] = Judgment(id=name, part=part, text=text, fields=row)
    return list(judgments.values())


def _rows(path: Path) -> list[tuple[int, JsonObject]]:
    return list(Content(path, unpack(path), "", False).json_lines())


def _texts(row: JsonObject, where: str) -> tuple[str, ...]:
    response = row.get("response")
    if isinstance(response, list) and response and all(isinstance(part, int | float) for part in response):
        response = json.dumps(response)
    texts = response if isinstance(response, list) else [response]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: field 'response' is not a text or a list of texts")
    return tuple(texts)


def _tuple(value: Any) -> tuple[Any, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _from_one(row: JsonObject, name: str, where: str) -> int:
    value = row.get(name, 1)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{where}: field {name!r} is {value!r}; expected 1 or more")
    return value


def _read_id(path: Path, number: int, row: JsonObject) -> str:
    if not isinstance(row.get("id"), str | int) or isinstance(row.get("id"), bool):
        raise DataError(
            f"{path}:{number}: field 'id' is {row.get('id')!r}; expected a string or an integer",
            hint=f"the row's fields are {', '.join(row) or 'none'}; docs/evaluation.md has the ones to write",
        )
    return str(row["id"])


def _unknown_id(path: Path, number: int, name: str, known: Mapping[str, Item]) -> DataError:
    example = nearest(name, known) or next(iter(known), "none")
    return DataError(
        f"{path}:{number}: id {name!r} is not in the benchmark", hint=f"ids look like {example!r}"
    )
