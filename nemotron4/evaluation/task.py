"""What a benchmark consists of: items with prompts, decoding, a judge where it has one, and its score.

A task is data and pure functions. Models, files of answers, judges and the runner are outside.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemotron4.client.interface import Sampling
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.grading.sandbox import Sandbox
from nemotron4.grading.score import Score
from nemotron4.grading.statistics import Interval, bootstrap_ratio, wilson
from nemotron4.records import Message


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question: its first request, the user turns after the model's answers, and what scoring needs.

    ``is_raw``: the message's text is continued as it stands, without a chat template (base models).
    """

    id: str
    messages: tuple[Message, ...]
    follow_ups: tuple[str, ...] = ()
    is_raw: bool = False
    group: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """What a judge said of one part of one item: a turn (MT-Bench) or a game (Arena-Hard), from 1."""

    id: str
    part: int = 1
    text: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JudgeRequest:
    """One question to the judge. ``retry`` is asked once more, after its reply, if ``is_usable`` says no."""

    id: str
    part: int
    messages: tuple[Message, ...]
    sampling: Sampling
    fields: Mapping[str, Any] = field(default_factory=dict)
    is_usable: Callable[[str], bool] | None = None
    retry: str | None = None


@dataclass(frozen=True)
class Metric:
    """One number: shares in percent, ratings as they are; ``value`` is None if nothing could be scored."""

    value: float | None
    numerator: float | None = None
    denominator: float | None = None
    interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The metrics of a task, what was left out of them and why, and each item's values."""

    metrics: Mapping[str, Metric]
    unscored: Mapping[str, int] = field(default_factory=dict)
    unparsed: int = 0
    items: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What there is to score. ``responses`` has one text per turn of each answered item."""

    items: Sequence[Item]
    responses: Mapping[str, Sequence[str]]
    judgments: Sequence[Judgment] = ()
    source: DataSource
    seed: int = 0
    sandbox: Sandbox | None = None


Judge = Callable[[Sequence[Item], Mapping[str, Sequence[str]], DataSource], list[JudgeRequest]]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark under one name. Two definitions never share a name."""

    name: str
    title: str
    files: tuple[DataFile, ...]
    load: Callable[[DataSource], list[Item]]
    score: Callable[[Inputs], Outcome]
    sampling: Sampling
    prompt: str  # the template, for its hash
    card: Mapping[str, float] = field(default_factory=dict)  # metric -> published value of 340B-Instruct
    judge: Judge | None = None
    card_judge: str | None = None
    needs_sandbox: bool = False
    needs_responses: bool = True  # False: a judge's texts are enough to score
    is_outside: Callable[[str], bool] = lambda _: False  # an id of a larger set that this one is a part of
    note: str = ""

    @property
    def main_file(self) -> DataFile:
        return self.files[0]


def answered(inputs: Inputs) -> tuple[list[Item], Counter[str]]:
    """The items with a response, and the count of those without."""
    found = [item for item in inputs.items if item.id in inputs.responses]
    missing = len(inputs.items) - len(found)
    return found, Counter({"no response": missing}) if missing else Counter()


def accuracy(scores: Sequence[Score]) -> Metric:
    """Percent right of the scored, with Wilson's interval."""
    values = [score.value for score in scores if score.value is not None]
    return share(sum(values), len(values))


def share(numerator: float, denominator: float, interval: Interval | None = None) -> Metric:
    """A percentage. The interval is given on the scale 0 to 1; without one it is Wilson's."""
    if not denominator:
        return Metric(None, 0, 0)
    interval = interval or wilson(numerator, denominator)
    percent = Interval(100 * interval.lower, 100 * interval.upper, interval.method)
    return Metric(100 * numerator / denominator, numerator, denominator, percent)


def _subject_mean(items: Sequence[Item], scores: Sequence[Score], *, seed: int) -> Metric:
    """The plain mean of the groups' accuracies; its interval draws groups."""
    groups: dict[str, list[float]] = defaultdict(list)
    for item, found in zip(items, scores, strict=True):
        if found.value is not None:
            groups[item.group].append(found.value)
    if not groups:
        return Metric(None, 0, 0)
    means = [sum(values) / len(values) for values in groups.values()]
    drawn = bootstrap_ratio(means, [1.0] * len(means), seed=seed)
    method = drawn.method.replace("questions", "subjects")
    return share(sum(means), len(means), Interval(drawn.lower, drawn.upper, method))


def accuracy_by_group(inputs: Inputs, grade: Callable[[str, str], Score]) -> Outcome:
    """``accuracy`` over all questions and the mean over groups; ``grade`` sees response and answer."""
    items, unscored = answered(inputs)
    scores = [grade(inputs.responses[item.id][0], item.fields["answer"]) for item in items]
    return Outcome(
        metrics={
            "accuracy": accuracy(scores),
            "macro_accuracy": _subject_mean(items, scores, seed=inputs.seed),
        },
        unscored=unscored,
        unparsed=sum(found.is_unparsed for found in scores),
        items={item.id: {"accuracy": found.value} for item, found in zip(items, scores, strict=True)},
    )


def finite(value: float) -> float | None:
    """None for NaN: a number that could not be computed is unscored."""
    return None if math.isnan(value) else value


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)
