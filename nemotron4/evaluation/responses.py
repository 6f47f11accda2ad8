"""Stored answers and judgments, as anyone may have written them: JSON lines, plain or gzipped.

responses: ``{"id", "response"}``; a multi-turn task has a list of texts, or one row per ``turn``; where
numbers are scored (rewards, log-probabilities of choices) the response is a list of numbers.
judgments: ``{"id", "turn" or "game", "text"}``, or log-probabilities or a stored preference (AlpacaEval).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nemotron4.errors import DataError, nearest
from nemotron4.evaluation.data import Content, unpack
from nemotron4.evaluation.task import Item, Judgment
from nemotron4.records import JsonObject

RESPONSES_FILE = "responses.jsonl"
JUDGMENTS_FILE = "judgments.jsonl"
FAILURES_FILE = "failures.jsonl"
SAMPLES_FILE = "samples.jsonl"  # which log of the viewer shows which ids


def _rows(path: Path) -> list[tuple[int, JsonObject]]:
    return list(Content(path, unpack(path), "", False).json_lines())


def _read_id(path: Path, number: int, row: JsonObject) -> str:
    if not isinstance(row.get("id"), str | int) or isinstance(row.get("id"), bool):
        raise DataError(f"{path}:{number}: field 'id' is {row.get('id')!r}; expected a string or an integer")
    return str(row["id"])


def _unknown_id(path: Path, number: int, name: str, known: Mapping[str, Item]) -> DataError:
    example = nearest(name, known) or next(iter(known), "none")
    return DataError(
        f"{path}:{number}: id {name!r} is not in the benchmark", hint=f"ids look like {example!r}"
    )


def read_responses(
    path: Path, items: Sequence[Item], is_outside: Callable[[str], bool]
) -> tuple[dict[str, tuple[str, ...]], int]:
    """Texts by item id, one per turn, and the number of rows left out as ``is_outside`` of the task's set.

    Other unknown ids and repeated ids are errors.
    """
    known = {item.id: item for item in items}
    num_outside = 0
    turns: dict[str, dict[int, str]] = {}
    for number, row in _rows(path):
        name = _read_id(path, number, row)
        if name not in known:
            if not is_outside(name):
                raise _unknown_id(path, number, name, known)
            num_outside += 1
            continue
        response = row.get("response")
        if (
            isinstance(response, list)
            and response
            and all(isinstance(part, int | float) for part in response)
        ):
            response = json.dumps(response)
        texts = response if isinstance(response, list) else [response]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{path}:{number}: field 'response' is not a text or a list of texts")
        first = row.get("turn", 1)
        if not isinstance(first, int) or first < 1:
            raise DataError(f"{path}:{number}: field 'turn' is {first!r}; expected 1 or more")
        for turn, text in enumerate(texts, start=first):
            if turn in turns.setdefault(name, {}):
                raise DataError(f"{path}:{number}: id {name!r} is answered twice")
            turns[name][turn] = text
    for name, by_turn in turns.items():
        expected = 1 + len(known[name].follow_ups)
        if sorted(by_turn) != list(range(1, expected + 1)):
            raise DataError(f"{path}: id {name!r} has turns {sorted(by_turn)}; expected 1 to {expected}")
    found = {name: tuple(by_turn[turn] for turn in sorted(by_turn)) for name, by_turn in turns.items()}
    return found, num_outside


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
