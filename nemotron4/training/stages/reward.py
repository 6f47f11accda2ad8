"""Reward models: regression on attributes, or Bradley-Terry on pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nemotron4.records import FieldError, Message
from nemotron4.training import rows
from nemotron4.training.encoding import Encoder, RowError, RowKind
from nemotron4.training.rows import ALL_ATTRIBUTES, MISSING, Fields, Prompt
from nemotron4.training.samples import Sample
from nemotron4.training.stage import Objective, Stage
from nemotron4.training.stages.preference import PairRow, read_pair

VARIANTS: dict[str, Literal["regular", "margin", "scaled"]] = {
    "bradley_terry": "regular",
    "bradley_terry_margin": "margin",
    "bradley_terry_scaled": "scaled",
}


@dataclass(frozen=True, kw_only=True)
class RewardSection:
    """``objective`` regression needs attributes in the rows; the Bradley-Terry ones need pairs."""

    objective: Literal["regression", "bradley_terry", "bradley_terry_margin", "bradley_terry_scaled"] = (
        "regression"
    )
    attributes: tuple[str, ...] = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    score: str = "helpfulness"  # the output that Bradley-Terry trains


@dataclass(frozen=True, kw_only=True)
class ScoredRow:
    """A conversation, or its rendered text, and the attributes that were judged."""

    conversation: Prompt
    attributes: Mapping[str, float]


@dataclass(frozen=True)
class ScoredKind(RowKind):
    """``messages`` and ``attributes``; HelpSteer2's columns; NeMo-Aligner's ``text`` and ``label``."""

    name = "reward"
    trains_text = False
    trained: tuple[str, ...] = ALL_ATTRIBUTES  # what is not trained counts as missing

    def parse(self, row: Fields) -> ScoredRow:
        if "attributes" in row:
            given = Fields(
                row.require("attributes", dict, f"an object with some of {', '.join(ALL_ATTRIBUTES)}")
            )
            for name in given:
                if name not in ALL_ATTRIBUTES:
                    raise FieldError(f"attributes has {name!r}; expected some of {', '.join(ALL_ATTRIBUTES)}")
            messages = (*rows.system(row), *rows.messages(row, "messages"))
            if messages[-1].role != "assistant":
                raise FieldError(
                    f"field 'messages' ends with {messages[-1].role}; expected the judged answer"
                )
            return ScoredRow(conversation=messages, attributes=_numbers(given, list(given)))
        if "text" in row and "label" in row:
            return ScoredRow(conversation=row.text("text"), attributes=_nemo_label(row))
        if "response" in row and ("prompt" in row or "context" in row):
            names = [name for name in ALL_ATTRIBUTES if name in row]
            if not names:
                raise FieldError(f"no attribute is there; expected some of {', '.join(ALL_ATTRIBUTES)}")
            prompt = (
                rows.marked_turns(row.text("prompt"))
                if isinstance(row.row.get("prompt"), str)
                else (rows.messages(row, "prompt" if "prompt" in row else "context"))
            )
            messages = (*rows.system(row), *prompt, Message("assistant", row.text("response")))
            return ScoredRow(conversation=messages, attributes=_numbers(row, names))
        raise rows.no_form(row, "messages and attributes, text and label, or prompt, response and attributes")

    def sample(self, row: ScoredRow, encoder: Encoder) -> Sample:
        given = row.attributes
        labels = tuple(given.get(n, MISSING) if n in self.trained else MISSING for n in ALL_ATTRIBUTES)
        if all(label == MISSING for label in labels):
            raise RowError(f"none of the trained attributes is labelled: {', '.join(self.trained)}")
        return Sample((encoder.judged_text(row.conversation),), labels)

    def numbers(self, row: ScoredRow) -> Mapping[str, float]:
        turns = {} if isinstance(row.conversation, str) else {"turns": float(len(row.conversation))}
        return {**turns, **row.attributes}


def _numbers(row: Fields, names: list[str]) -> dict[str, float]:
    found = {name: row.number(name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _nemo_label(row: Fields) -> dict[str, float]:
    values = row.require("label", list, f"{len(ALL_ATTRIBUTES)} numbers")
    is_right = len(values) == len(ALL_ATTRIBUTES) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    if not is_right:
        raise FieldError(
            f"field 'label' is {values!r}; expected {len(ALL_ATTRIBUTES)} numbers, -100 for none"
        )
    given = Fields(dict(zip(ALL_ATTRIBUTES, values, strict=True)))
    return {name: value for name, value in _numbers(given, list(given)).items() if value != MISSING}


@dataclass(frozen=True)
class RewardPairKind(RowKind):
    """Pairs as preferences have them, or NeMo-Aligner's texts: odd lines chosen, the next ones rejected."""

    name = "reward_pairs"
    trains_text = False
    needs_strength: bool = False

    def parse(self, row: Fields) -> PairRow:
        return read_pair(row)

    def joined(self, rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        first: tuple[str, Any] | None = None
        for where, row in rows:
            is_half = isinstance(row, dict) and set(row) == {"text"}
            if first is None and is_half:
                first = (where, row)
            elif first is not None:
                if is_half:
                    yield first[0], {"prompt": "", "chosen": first[1]["text"], "rejected": row["text"]}
                else:
                    yield first[0], "a chosen text without the rejected text that should follow"
                    yield where, row
                first = None
            else:
                yield where, row
        if first is not None:
            yield first[0], "a chosen text without the rejected text that should follow"

    def sample(self, row: PairRow, encoder: Encoder) -> Sample:
        if row.chosen == row.rejected:
            raise RowError("chosen and rejected are equal")
        if self.needs_strength and row.strength is None:
            raise RowError("field 'margin' or 'preference_strength' is missing; the objective needs it")
        labels = (row.strength,) if row.strength is not None else ()
        segments = tuple(
            encoder.judged_text(_conversation(row.prompt, answer), row.tools)
            for answer in (row.chosen, row.rejected)
        )
        return Sample(segments, labels)

    def numbers(self, row: PairRow) -> Mapping[str, float]:
        return {} if row.strength is None else {"strength": row.strength}


def _conversation(prompt: Prompt, answer: str) -> Prompt:
    return prompt + answer if isinstance(prompt, str) else (*prompt, Message("assistant", answer))


class RewardStage(Stage):
    name = "reward"
    section = RewardSection
    kinds = (ScoredKind(), RewardPairKind())
    examples: ClassVar = {"reward": {}, "bradley-terry": {"objective": "bradley_terry"}}
    has_reward_head = True

    def kind(self, settings: RewardSection) -> RowKind:
        if settings.objective == "regression":
            return ScoredKind(settings.attributes)
        return RewardPairKind(needs_strength=settings.objective != "bradley_terry")

    def objective(self, settings: RewardSection) -> Objective:
        from nemotron4.training.objectives import BradleyTerryObjective, RegressionObjective

        if settings.objective == "regression":
            return RegressionObjective(ALL_ATTRIBUTES)
        return BradleyTerryObjective(VARIANTS[settings.objective], ALL_ATTRIBUTES.index(settings.score))


STAGE = RewardStage()
