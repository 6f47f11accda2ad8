"""Judgments as rows for training: one form for every study.

A rated answer gives one row: the mean of its annotators, attribute by attribute, as HelpSteer's own training
file has it. What each of them said is in ``meta.annotators``, so nothing is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nemotron4.annotation.vocabulary import Annotation
from nemotron4.errors import unknown
from nemotron4.json_form import JsonForm
from nemotron4.records import ATTRIBUTES, JsonObject, Message, PreferencePair, Record, RewardSample

ExportForm = Literal["judgments", "preference", "reward"]


@dataclass(frozen=True)
class Export(JsonForm):
    """``rows`` in the asked form, and how many items gave none, by reason."""

    rows: tuple[Record | JsonObject, ...]
    left_out: dict[str, int]


def check_form(form: str, known: Sequence[str] = get_args(ExportForm)) -> None:
    if form not in known:
        raise unknown("form", form, known)


def collect(found: Iterable[Sequence[Record | JsonObject]], reason: str) -> Export:
    """The rows of each item; an item without any is left out for the reason."""
    rows: list[Record | JsonObject] = []
    left_out: Counter[str] = Counter()
    for of_item in found:
        rows += of_item
        left_out[reason] += not of_item
    return Export(tuple(rows), {name: number for name, number in left_out.items() if number})


def reward_sample(
    name: str, messages: tuple[Message, ...], judgments: Iterable[Annotation], meta: Mapping[str, Any]
) -> RewardSample | None:
    """One rated answer, the last of ``messages``; None where nobody rated an attribute."""
    people = {
        judgment.annotator: {key: judgment.values[key] for key in ATTRIBUTES if key in judgment.values}
        for judgment in sorted(judgments, key=lambda each: each.annotator)
    }
    people = {annotator: values for annotator, values in people.items() if values}
    attributes = {}
    for key in ATTRIBUTES:
        said = [values[key] for values in people.values() if key in values]
        if said:
            attributes[key] = sum(said) / len(said)
    if not attributes:
        return None
    return RewardSample(
        id=name,
        messages=messages,
        attributes=attributes,
        meta={**meta, "num_annotators": len(people), "annotators": people},
    )


def corrections(
    name: str, prompt: tuple[Message, ...], answer: str, judgments: Iterable[Annotation], question: str
) -> Iterator[tuple[str, PreferencePair]]:
    """(annotator, pair) of each better answer that somebody wrote."""
    for judgment in judgments:
        if better := judgment.values.get(question):
            yield (judgment.annotator, PreferencePair(id=name, prompt=prompt, chosen=better, rejected=answer))
