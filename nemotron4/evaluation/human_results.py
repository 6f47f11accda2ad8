"""What a study says: win, tie and loss against a baseline, perceived length, agreement of annotators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from nemotron4.annotation.figures import PairAgreement, agreements
from nemotron4.errors import unknown
from nemotron4.evaluation.human import AXES, LENGTHS, UNCATEGORISED, VOCABULARY, AnswerRating, Study
from nemotron4.grading.statistics import Interval, bootstrap_ratio, wilson
from nemotron4.json_form import HIDDEN, JsonForm, named
from nemotron4.report import Block, Table, Text, percent

OUTCOMES = ("win", "tie", "loss")


@dataclass(frozen=True)
class Comparison(JsonForm):
    """A model against the baseline on one axis, over pairs that one annotator rated of one prompt.

    ``percent`` has two decimals and sums to 100; intervals are drawn over prompts.
    """

    model: str
    axis: str
    category: str
    counts: Mapping[str, int]
    intervals: Mapping[str, Interval] = field(metadata=HIDDEN)
    also_written: ClassVar = {"comparisons": "total", "percent": "percent", "intervals": "percent_intervals"}

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def percent_intervals(self) -> dict[str, list[float]]:
        return {name: [100 * i.lower, 100 * i.upper] for name, i in self.intervals.items()}

    @property
    def percent(self) -> dict[str, float]:
        """By largest remainder, so that rounding keeps the sum."""
        exact = {name: 10000 * count / self.total for name, count in self.counts.items()}
        whole = {name: int(value) for name, value in exact.items()}
        by_remainder = sorted(exact, key=lambda name: whole[name] - exact[name])
        for name in by_remainder[: 10000 - sum(whole.values())]:
            whole[name] += 1
        return {name: value / 100 for name, value in whole.items()}


@dataclass(frozen=True)
class StudyResult(JsonForm):
    """``left_out_prompts`` lack an answer of some model; ``unpaired`` ratings have no partner yet."""

    baseline: str
    num_prompts: int = field(metadata=named("prompts"))
    left_out_prompts: int = field(metadata=named("prompts_left_out"))
    num_ratings: int = field(metadata=named("ratings"))
    unpaired: int = field(metadata=named("ratings_without_a_partner"))
    comparisons: tuple[Comparison, ...]
    lengths: Mapping[str, Mapping[str, int]]
    means: Mapping[str, Mapping[str, float]]
    agreements: tuple[PairAgreement, ...]


def evaluate(study: Study, baseline: str, *, seed: int = 0) -> StudyResult:
    """All comparisons with the baseline, overall and by category."""
    if baseline not in study.models:
        raise unknown("model", baseline, study.models)
    ratings = study.ratings()
    category = {prompt.id: str(prompt.category or UNCATEGORISED) for prompt in study.prompts}
    by_key = {(r.annotator, r.prompt, r.model): r for r in ratings}
    pairs = [
        (rating, by_key[rating.annotator, rating.prompt, baseline])
        for rating in ratings
        if rating.model != baseline and (rating.annotator, rating.prompt, baseline) in by_key
    ]
    num_unpaired = sum(r.model != baseline for r in ratings) - len(pairs)
    categories = ["all", *sorted(set(category.values()))]
    comparisons = [
        _compare(
            model,
            axis,
            wanted,
            [(a, b) for a, b in pairs if a.model == model and wanted in ("all", category[a.prompt])],
            seed,
        )
        for model in study.models
        if model != baseline
        for axis in AXES
        for wanted in categories
    ]
    return StudyResult(
        baseline=baseline,
        num_prompts=len(study.prompts),
        left_out_prompts=len(study.prompts) - len(study.complete_prompts),
        num_ratings=len(ratings),
        unpaired=num_unpaired,
        comparisons=tuple(each for each in comparisons if each.total),
        lengths={model: _lengths(ratings, model) for model in study.models},
        means={model: _means(ratings, model) for model in study.models},
        agreements=agreements(study.store.judgments(), VOCABULARY),
    )


def _compare(
    model: str, axis: str, category: str, pairs: Sequence[tuple[AnswerRating, AnswerRating]], seed: int
) -> Comparison:
    by_prompt: dict[str, list[str]] = defaultdict(list)
    for ours, theirs in pairs:
        difference = getattr(ours, axis) - getattr(theirs, axis)
        by_prompt[ours.prompt].append("win" if difference > 0 else "loss" if difference < 0 else "tie")
    outcomes = [outcome for found in by_prompt.values() for outcome in found]
    counts_Q = [len(found) for found in by_prompt.values()]
    return Comparison(
        model,
        axis,
        category,
        {name: outcomes.count(name) for name in OUTCOMES},
        {
            name: bootstrap_ratio([found.count(name) for found in by_prompt.values()], counts_Q, seed=seed)
            for name in OUTCOMES
        },
    )


def _lengths(ratings: Sequence[AnswerRating], model: str) -> dict[str, int]:
    said = [rating.length for rating in ratings if rating.model == model]
    return {name: said.count(name) for name in LENGTHS}


def _means(ratings: Sequence[AnswerRating], model: str) -> dict[str, float]:
    own = [rating for rating in ratings if rating.model == model]
    return {axis: sum(getattr(r, axis) for r in own) / len(own) for axis in AXES} if own else {}


def result_blocks(result: StudyResult) -> list[Block]:
    """The study for a reader."""
    overall = [
        f"{c.model} wins {c.percent['win']:.1f} % and loses {c.percent['loss']:.1f} %"
        for c in result.comparisons
        if (c.axis, c.category) == (AXES[0], "all")
    ]
    rows = [
        [each.model, each.axis, each.category, *(_outcome(each, name) for name in OUTCOMES), str(each.total)]
        for each in result.comparisons
    ]
    lengths = []
    for model, counts in result.lengths.items():
        total = sum(counts.values())
        shares = [percent(n / total if total else None, wilson(n, total)) for n in counts.values()]
        lengths.append([model, *shares])
    said = "; ".join(overall) or "no two answers are compared yet"
    return [
        Text(f"Against {result.baseline}, by {AXES[0]}: {said}.", is_verdict=True),
        Text(
            f"{result.num_ratings} ratings of {result.num_prompts} prompts ({result.left_out_prompts} left "
            f"out: an answer is missing; {result.unpaired} ratings without a partner)."
        ),
        Table(["model", "axis", "category", *(f"{name}, %" for name in OUTCOMES), "pairs"], rows),
        Table(["model", *(name.replace("_", " ") for name in LENGTHS)], lengths, "Perceived length"),
        *(pair.table() for pair in result.agreements),
    ]


def _outcome(each: Comparison, name: str) -> str:
    span = each.intervals[name]
    return f"{each.percent[name]:.2f} [{100 * span.lower:.1f}, {100 * span.upper:.1f}]"
