"""What a benchmark consists of: items with prompts, decoding, a judge where it has one, and its score.

A task is data and pure functions. Models, files of answers, judges and the runner are outside.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.grading.sandbox import Sandbox
from nemotron4.grading.score import Score
from nemotron4.grading.statistics import Interval, bootstrap_ratio, wilson
from nemotron4.records import Message


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question: its first request, the user turns after the model's answers, and what scoring needs.

    ``is_raw``: the message's text is continued as it is, without a chat template (base models).
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
    reasons: Mapping[str, str] = field(default_factory=dict)  # item -> why it has its score
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
    verdicts: tuple[str, ...] = ()  # all that a judge may say under `--set verdict=choice`
    own_code: str = ""  # hash of a grader outside the package
    needs_sandbox: bool = False
    needs_responses: bool = True  # False: a judge's texts are enough to score
    is_outside: Callable[[str], bool] = lambda _: False  # an id of a larger set that this one is a part of
    is_generative: bool = True  # False: numbers are scored, of choices or rewards
    # What a request that can never succeed is, unless told otherwise: as the benchmark's own program does it.
    on_failure: Literal["wrong", "exclude", "stop"] = "exclude"
    with_options: Callable[[Mapping[str, Any]], Task] | None = None  # for --set and --num-fewshot
    options: Mapping[str, Any] = field(default_factory=dict)  # what may be set, with its values
    changed: Mapping[str, Any] = field(default_factory=dict)  # what makes this another definition
    note: str = ""

    @property
    def main_file(self) -> DataFile:
        return self.files[0]


def load_items(task: Task, source: DataSource) -> list[Item]:
    """The task's items; DataError for an id on two of them, as one would get the other's answer."""
    items = task.load(source)
    for name, count in Counter(item.id for item in items).items():
        if count > 1:
            raise DataError(
                f"{task.name}: id {name!r} is on {count} rows of the data", hint="ids must differ"
            )
    return items


def choose(items: Sequence[Item], *, limit: int | None, seed: int) -> list[Item]:
    """All items, or a seeded sample in the benchmark's order. A larger sample holds every smaller one."""
    if limit is None or limit >= len(items):
        return list(items)
    shuffled = list(range(len(items)))
    random.Random(seed).shuffle(shuffled)
    return [items[at] for at in sorted(shuffled[:limit])]


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


def mean(values: Sequence[float], seed: int) -> Metric:
    """The values as they are, with a bootstrap's interval."""
    if not values:
        return Metric(None, 0, 0)
    drawn = bootstrap_ratio(list(values), [1.0] * len(values), seed=seed)
    return Metric(sum(values) / len(values), sum(values), len(values), drawn)


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
        reasons=why(items, scores),
    )


def why(items: Sequence[Item], scores: Sequence[Score]) -> dict[str, str]:
    """What the grader said of each item, such as ``timeout``."""
    return {item.id: found.reason for item, found in zip(items, scores, strict=True) if found.reason}


def combine_epochs(outcomes: Sequence[Outcome], *, seed: int) -> Outcome:
    """The mean of every metric over the epochs, and pass@k where items are right or wrong (Chen et al. 2021).

    Intervals are bootstraps over items: the answers to one item are not independent.
    """
    num_epochs = len(outcomes)
    by_metric: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        for name, values in outcome.items.items():
            for metric, value in values.items():
                if value is not None:
                    by_metric[metric][name].append(value)
    metrics: dict[str, Metric] = {}
    for metric in dict.fromkeys(name for outcome in outcomes for name in outcome.metrics):
        # Own tasks know items by one score, whose metric has its name by what the scores are.
        key = "score" if metric in ("accuracy", "mean") and "score" in by_metric else metric
        if key not in by_metric:
            known = [o.metrics[metric].value for o in outcomes if metric in o.metrics]
            found = [value for value in known if value is not None]
            metrics[metric] = Metric(sum(found) / len(found) if found else None)
            continue
        items = by_metric[key]
        means = [sum(values) / len(values) for values in items.values()]
        is_binary = {value for values in items.values() for value in values} <= {0.0, 1.0}
        if metric == "mean":
            metrics[metric] = mean(means, seed)
        elif is_binary or key == metric:
            metrics[metric] = _share_of(means, seed)
        if is_binary:
            whole = [int(sum(values)) for values in items.values() if len(values) == num_epochs]
            for k in range(2, num_epochs + 1):
                chances = [_pass_at(num_epochs, c, k) for c in whole]
                metrics[f"{metric} (pass@{k})"] = _share_of(chances, seed)
    return Outcome(
        metrics=metrics,
        unscored=sum((Counter(outcome.unscored) for outcome in outcomes), Counter()),
        unparsed=sum(outcome.unparsed for outcome in outcomes),
        items={
            name: {
                metric: sum(items[name]) / len(items[name])
                for metric, items in by_metric.items()
                if name in items
            }
            for name in dict.fromkeys(name for outcome in outcomes for name in outcome.items)
        },
        reasons={name: reason for outcome in reversed(outcomes) for name, reason in outcome.reasons.items()},
        notes=(*outcomes[0].notes, f"{num_epochs} epochs: metrics are means over them"),
    )


def _pass_at(num_samples: int, num_right: int, k: int) -> float:
    """The share of draws of ``k`` of the samples that hold a right one."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def _share_of(values: Sequence[float], seed: int) -> Metric:
    if not values:
        return Metric(None, 0, 0)
    return share(sum(values), len(values), bootstrap_ratio(list(values), [1.0] * len(values), seed=seed))


def finite(value: float) -> float | None:
    """None for NaN: a number that could not be computed is unscored."""
    return None if math.isnan(value) else value


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)
