"""How far two annotators agree beyond chance: Cohen's kappa, plain or with quadratic weights.

N = items that both annotated, K = labels
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from nemotron4.grading.statistics import Interval

Weights = Literal["equal", "quadratic"]
Array = npt.NDArray[np.float64]


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


def agreement_line(name: str, one: Agreement) -> str:
    """One line for a reader; kappa that is not defined says so."""
    kappa = "not defined: both used one label" if one.kappa is None else f"{one.kappa:.2f}"
    span = "" if one.interval is None else f" [{one.interval.lower:.2f}, {one.interval.upper:.2f}]"
    weights = ", quadratic weights" if one.weights == "quadratic" else ""
    return f"  {name:<14}{kappa}{span}, {one.num_items} in common{weights}"
