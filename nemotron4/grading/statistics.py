"""Intervals, comparisons and agreement. A score without its interval is not reported, so these have one home.

N = items, Q = questions (what is resampled), R = bootstrap rounds, K = labels of an annotator
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from nemotron4.report import Table

Z_95 = 1.959963984540054
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval on the scale of its estimate, and how it was made."""

    lower: float
    upper: float
    method: str

    @property
    def bounds(self) -> tuple[float, float]:
        return self.lower, self.upper


def wilson(numerator: float, denominator: float, *, z: float = Z_95) -> Interval:
    """Wilson's score interval of a share, 0 to 1. Without items it is the whole range."""
    if denominator <= 0:
        return Interval(0.0, 1.0, "wilson")
    share = numerator / denominator
    spread = z * math.sqrt(share * (1 - share) / denominator + z * z / (4 * denominator**2))
    centre, scale = share + z * z / (2 * denominator), 1 + z * z / denominator
    lower, upper = (centre - spread) / scale, (centre + spread) / scale
    return Interval(max(0.0, min(lower, share)), min(1.0, max(upper, share)), "wilson")


def bootstrap_ratio(
    sums_Q: Sequence[float], counts_Q: Sequence[float], *, rounds: int = 1000, seed: int = 0
) -> Interval:
    """Interval of sum(sums) / sum(counts) when whole questions are drawn again with replacement.

    Parts of one question (turns, games, instructions) move together, as they are not independent.
    """
    sums, counts = np.asarray(sums_Q, np.float64), np.asarray(counts_Q, np.float64)
    method = f"bootstrap over {len(sums)} questions, {rounds} rounds, seed {seed}"
    if not len(sums) or not counts.sum():
        return Interval(math.nan, math.nan, method)
    drawn_RQ = np.random.default_rng(seed).integers(0, len(sums), (rounds, len(sums)))
    totals_R = counts[drawn_RQ].sum(axis=1)
    ratios_R = sums[drawn_RQ].sum(axis=1)[totals_R > 0] / totals_R[totals_R > 0]
    lower, upper = np.percentile(ratios_R, [2.5, 97.5])
    return Interval(float(lower), float(upper), method)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, with N - 1; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return float(np.std(np.asarray(values, np.float64), ddof=1) / math.sqrt(len(values)))


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same items: the mean difference (second minus first), its interval and p-value."""

    difference: float
    interval: Interval
    p_value: float
    num_items: int
    method: str


def mcnemar(first_N: Sequence[bool], second_N: Sequence[bool], *, seed: int = 0) -> PairedTest:
    """Exact two-sided test on the items that flipped, for right-or-wrong scores."""
    pairs = list(zip(first_N, second_N, strict=True))
    lost = sum(bool(a) and not b for a, b in pairs)
    won = sum(bool(b) and not a for a, b in pairs)
    p_value = _binomial_two_sided(min(lost, won), lost + won)
    differences = [float(b) - float(a) for a, b in pairs]
    return PairedTest(
        difference=sum(differences) / len(pairs) if pairs else math.nan,
        interval=bootstrap_ratio(differences, [1.0] * len(pairs), seed=seed),
        p_value=p_value,
        num_items=len(pairs),
        method=f"McNemar, exact; {won} won, {lost} lost",
    )


def _binomial_two_sided(fewer: int, total: int) -> float:
    """Probability of a split at least as uneven as fewer : total - fewer for a fair coin."""
    if total == 0:
        return 1.0
    tail: float = sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total
    return min(1.0, 2.0 * tail)


def sign_flips(
    first_N: Sequence[float], second_N: Sequence[float], *, rounds: int = 10_000, seed: int = 0
) -> PairedTest:
    """Two-sided permutation test on paired differences, for ratings and preferences."""
    differences_N = np.asarray(second_N, np.float64) - np.asarray(first_N, np.float64)
    interval = bootstrap_ratio(differences_N.tolist(), [1.0] * len(differences_N), seed=seed)
    method = f"paired sign flips, {rounds} rounds, seed {seed}"
    if not len(differences_N):
        return PairedTest(math.nan, interval, 1.0, 0, method)
    observed = abs(float(differences_N.sum()))
    generator = np.random.default_rng(seed)
    beyond = 0
    for _ in range(rounds):
        signs_N = generator.integers(0, 2, len(differences_N)) * 2 - 1
        beyond += abs(float((signs_N * differences_N).sum())) >= observed - 1e-12
    return PairedTest(
        float(differences_N.mean()), interval, (beyond + 1) / (rounds + 1), len(differences_N), method
    )


def two_shares(passed_a: int, failed_a: int, passed_b: int, failed_b: int) -> float:
    """Fisher's exact two-sided p-value that two independent shares are equal."""
    num_a, num_passed = passed_a + failed_a, passed_a + passed_b
    total = num_a + passed_b + failed_b

    def log_probability(passed: int) -> float:
        return _log_choose(num_passed, passed) + _log_choose(total - num_passed, num_a - passed)

    observed = log_probability(passed_a)
    possible = range(max(0, num_a + num_passed - total), min(num_a, num_passed) + 1)
    # As likely as what was seen, or less; the small number takes up rounding.
    tail = sum(
        math.exp(log_probability(k) - _log_choose(total, num_a))
        for k in possible
        if log_probability(k) <= observed + 1e-7
    )
    return min(1.0, tail)


def _log_choose(total: int, chosen: int) -> float:
    return math.lgamma(total + 1) - math.lgamma(chosen + 1) - math.lgamma(total - chosen + 1)


def f1(true_positives: int, false_positives: int, false_negatives: int) -> tuple[float, float, float]:
    """Precision, recall and F1; NaN where there is nothing to divide by."""

    def share(part: float, whole: float) -> float:
        return part / whole if whole else math.nan

    precision = share(true_positives, true_positives + false_positives)
    recall = share(true_positives, true_positives + false_negatives)
    return (
        precision,
        recall,
        share(2 * true_positives, 2 * true_positives + false_positives + false_negatives),
    )


Weights = Literal["equal", "quadratic"]


@dataclass(frozen=True)
class Agreement:
    """``kappa`` is None where chance alone would agree always (both used one label), or without items."""

    kappa: float | None
    share_equal: float | None
    num_items: int
    interval: Interval | None
    weights: Weights


def cohen_kappa(
    first_N: Sequence[Hashable],
    second_N: Sequence[Hashable],
    labels_K: Sequence[Hashable],
    *,
    weights: Weights = "equal",
    rounds: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Kappa with a bootstrap interval over items (Cohen 1960; weighted: Cohen 1968).

    ``labels_K`` is the whole scale; its order counts with quadratic weights: a disagreement weighs the square
    of its distance.
    """
    place = {label: index for index, label in enumerate(labels_K)}
    pairs_N = [(place[a], place[b]) for a, b in zip(first_N, second_N, strict=True)]
    if not pairs_N:
        return Agreement(None, None, 0, None, weights)
    cost_KK = _costs(len(labels_K), weights)
    codes_N = np.asarray([a * len(labels_K) + b for a, b in pairs_N])
    kappa = _kappa(codes_N, cost_KK)
    generator = np.random.default_rng(seed)
    drawn = (codes_N[generator.integers(0, len(codes_N), len(codes_N))] for _ in range(rounds))
    values = [value for codes in drawn if (value := _kappa(codes, cost_KK)) is not None]
    interval = None
    if kappa is not None and values:
        lower, upper = np.percentile(values, [2.5, 97.5])
        method = f"bootstrap over {len(codes_N)} items, {rounds} rounds, seed {seed}"
        interval = Interval(float(lower), float(upper), method)
    return Agreement(kappa, float(np.mean([a == b for a, b in pairs_N])), len(pairs_N), interval, weights)


def _costs(num_labels: int, weights: Weights) -> Array:
    """What each kind of disagreement costs, 0 on the diagonal."""
    places_K = np.arange(num_labels, dtype=np.float64)
    distance_KK = np.abs(places_K[:, None] - places_K[None, :])
    return distance_KK**2 if weights == "quadratic" else (distance_KK > 0).astype(np.float64)


def _kappa(codes_N: npt.NDArray[np.int64], cost_KK: Array) -> float | None:
    num_labels = len(cost_KK)
    counts_KK = np.bincount(codes_N, minlength=num_labels**2).reshape(num_labels, num_labels)
    share_KK = counts_KK / counts_KK.sum()
    expected_KK = share_KK.sum(axis=1)[:, None] * share_KK.sum(axis=0)[None, :]
    by_chance = float((cost_KK * expected_KK).sum())
    if by_chance <= 0.0:
        return None
    return 1.0 - float((cost_KK * share_KK).sum()) / by_chance


def agreement_table(title: str, named: Mapping[str, Agreement]) -> Table:
    """A row for each thing that both annotated; kappa that is not defined says so."""
    rows = []
    for name, one in named.items():
        if one.num_items:
            kappa = "not defined: both used one label" if one.kappa is None else f"{one.kappa:.2f}"
            span = "" if one.interval is None else f"[{one.interval.lower:.2f}, {one.interval.upper:.2f}]"
            equal = "-" if one.share_equal is None else f"{100 * one.share_equal:.0f} %"
            rows.append([name, kappa, span, equal, str(one.num_items), one.weights])
    return Table(["about", "kappa", "95 % interval", "equal", "in common", "weights"], rows, title)
