"""Rows of KTO: single answers, judged good or bad."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nemotron4.records import FieldError
from nemotron4.training import rows
from nemotron4.training.encoding import Encoder, ReadRow, RowError, RowKind
from nemotron4.training.rows import Fields, Prompt
from nemotron4.training.samples import Sample
from nemotron4.training.stages.sft import merging, never_stops


@dataclass(frozen=True, kw_only=True)
class JudgedRow:
    """``other``: an answer to another prompt, which serves the baseline."""

    prompt: Prompt
    answer: str
    is_desirable: bool
    other: str = ""
    tools: tuple[Any, ...] = ()


class JudgedKind(RowKind):
    """``prompt``, ``completion``, ``label`` (TRL), or ``prompt``, ``response``, ``preference`` (NeMo)."""

    name = "kto"

    def parse(self, row: Fields) -> JudgedRow:
        if "preference" in row:
            value, name = row["preference"], "response"
            if value not in ("chosen", "rejected"):
                raise FieldError(f"field 'preference' is {value!r}; expected 'chosen' or 'rejected'")
            is_desirable = value == "chosen"
        else:
            is_desirable, name = row.require("label", bool, "true or false"), "completion"
        question = rows.asked(row)
        is_turn = isinstance(row.row.get(name), list)
        prompt = rows.prompt(row, "prompt", is_turn=is_turn) if question is None else question
        answer, tools = rows.answer(row, name), rows.tools(row)
        return JudgedRow(prompt=prompt, answer=answer, is_desirable=is_desirable, tools=tools)

    def related(self, rows: Iterator[ReadRow]) -> Iterator[tuple[ReadRow, Any]]:
        """Each row with the answer of the next row that has another prompt."""
        read = list(rows)
        judged: list[JudgedRow] = [each.row for each in read]
        if len({row.prompt for row in judged}) < 2:
            error = RowError(
                "KTO needs rows of two prompts or more: its baseline is of answers to other prompts"
            )
            yield from ((each, error) for each in read)
            return
        after = 0
        for place, row in enumerate(judged):
            after = max(after, place + 1)
            while judged[after % len(judged)].prompt == row.prompt:
                after += 1
            yield read[place], replace(row, other=judged[after % len(judged)].answer)

    def sample(self, row: JudgedRow, encoder: Encoder) -> Sample:
        answers = (row.answer, row.other)
        segments = tuple(encoder.answer(row.prompt, text, row.tools) for text in answers)
        return Sample(segments, (float(row.is_desirable),))

    def findings(self, row: JudgedRow, sample: Sample, encoder: Encoder) -> Iterator[tuple[str, str]]:
        yield from never_stops(sample, encoder)
        yield from merging(row.prompt, [row.answer], encoder)

    def numbers(self, row: JudgedRow) -> Mapping[str, float]:
        turns = {} if isinstance(row.prompt, str) else {"turns": float(len(row.prompt) + 1)}
        return turns | {"desirable": float(row.is_desirable)}
