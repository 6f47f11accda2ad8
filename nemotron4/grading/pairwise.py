"""Arena-Hard v0.1: win rate against one baseline, by the Bradley-Terry model.

With a single opponent the model is saturated: its win probability is the share of weighted battles won, ties
counting half. ``fit_bradley_terry`` is the general fit, kept as the slow twin.

B = battles (a game of weight 3 is three battles), R = bootstrap rounds
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nemotron4.grading.judgments import Verdict
from nemotron4.grading.statistics import Array, Interval

_ELO_PER_LOGIT = 400 / math.log(10)


def battles(verdicts: Sequence[Verdict]) -> list[float]:
    """Outcomes for the model, each repeated by its weight, in the order of the games."""
    return [verdict.outcome for verdict in verdicts for _ in range(verdict.weight)]


def win_rate(outcomes_B: Sequence[float]) -> float:
    """100 (W + T/2) / N; NaN without battles."""
    return 100 * sum(outcomes_B) / len(outcomes_B) if outcomes_B else math.nan


def battle_interval(outcomes_B: Sequence[float], *, rounds: int = 100, seed: int = 42) -> Interval:
    """The benchmark's own interval: battles drawn again, percentiles taken of the Elo ratings.

    The draws are those of the official code (``np.random.seed(42)``, ``DataFrame.sample``). It ignores that
    the games of one question agree; the bootstrap over questions does not.
    """
    method = f"bootstrap over {len(outcomes_B)} battles, {rounds} rounds, seed {seed} (official)"
    if not outcomes_B:
        return Interval(math.nan, math.nan, method)
    outcomes = np.asarray(outcomes_B, np.float64)
    generator = np.random.RandomState(seed)
    drawn = [generator.choice(len(outcomes), size=len(outcomes), replace=True) for _ in range(rounds)]
    shares_R = np.clip([outcomes[rows].mean() for rows in drawn], 1e-9, 1 - 1e-9)
    ratings_R = _ELO_PER_LOGIT * np.log(shares_R / (1 - shares_R))
    lower, upper = (_win_probability(float(np.percentile(ratings_R, level))) for level in (2.5, 97.5))
    return Interval(100 * lower, 100 * upper, method)


def _win_probability(rating: float) -> float:
    return 1 / (1 + math.exp(-rating / _ELO_PER_LOGIT))


def fit_bradley_terry(wins_MM: Array, *, iterations: int = 10_000, tolerance: float = 1e-12) -> Array:
    """Strengths (mean log 0) from ``wins[i, j]`` = wins of i over j, ties split in halves.

    Minorisation-maximisation (Hunter 2004, eq. 4). Every model must have won and lost.
    """
    games_MM = wins_MM + wins_MM.T
    won_M = wins_MM.sum(axis=1)
    if not (won_M > 0).all() or not (wins_MM.sum(axis=0) > 0).all():
        raise ValueError("every model needs at least one win and one loss for a finite rating")
    strength_M = np.ones(len(won_M))
    for _ in range(iterations):
        expected_MM = games_MM / (strength_M[:, None] + strength_M[None, :])
        updated_M = won_M / expected_MM.sum(axis=1)
        updated_M /= np.exp(np.log(updated_M).mean())
        if np.abs(np.log(updated_M / strength_M)).max() < tolerance:
            return np.asarray(np.log(updated_M))
        strength_M = updated_M
    return np.asarray(np.log(strength_M))
