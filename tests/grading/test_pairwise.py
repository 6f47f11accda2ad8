from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron4.grading import judgments
from nemotron4.grading.judgments import Verdict
from nemotron4.grading.statistics import Array

OUTCOMES = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=60)


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


@given(OUTCOMES.filter(lambda outcomes: 0 < sum(outcomes) < len(outcomes)))
def test_the_closed_form_is_the_fitted_bradley_terry_model(outcomes: list[float]) -> None:
    wins = np.array([[0, sum(outcomes)], [len(outcomes) - sum(outcomes), 0]])
    ratings = fit_bradley_terry(wins)
    fitted = 100 / (1 + math.exp(ratings[1] - ratings[0]))
    assert judgments.win_rate(outcomes) == pytest.approx(fitted, abs=1e-6)


def test_bradley_terry_recovers_known_strengths() -> None:
    strengths = np.array([1.0, 0.2, -1.2])
    wins = 1000 / (1 + np.exp(strengths[None, :] - strengths[:, None]))
    np.fill_diagonal(wins, 0)
    assert fit_bradley_terry(wins) == pytest.approx(strengths, abs=1e-6)
    with pytest.raises(ValueError, match="one win and one loss"):
        fit_bradley_terry(np.array([[0.0, 3.0], [0.0, 0.0]]))


def test_strong_verdicts_are_three_battles() -> None:
    outcomes = judgments.battles([Verdict(1, 3), Verdict(0.5, 1), Verdict(0, 1)])
    assert outcomes == [1, 1, 1, 0.5, 0]
    assert judgments.win_rate(outcomes) == 70
    assert math.isnan(judgments.win_rate([]))


@given(OUTCOMES)
def test_the_battle_interval_stays_within_0_and_100(outcomes: list[float]) -> None:
    interval = judgments.battle_interval(outcomes, rounds=20)
    assert 0 <= interval.lower <= interval.upper <= 100


def test_the_battle_interval_is_reproducible() -> None:
    outcomes = [1.0, 0.0, 0.5, 1.0] * 50
    assert judgments.battle_interval(outcomes) == judgments.battle_interval(outcomes)


@pytest.mark.parametrize(
    ("seed", "score", "lower", "upper"),
    [(0, 53.3, 50.63, 56.33), (1, 51.6, 48.25, 54.72), (2, 50.44, 47.95, 53.53)],
)
def test_score_and_interval_equal_the_official_code(
    seed: int, score: float, lower: float, upper: float
) -> None:
    """Expected: show_result.py of arena-hard-auto @ddef8ef (logistic regression, 100 rounds, seed 42)."""
    generator = random.Random(seed)
    verdicts = []
    for _ in range(300):
        for game in (1, 2):
            labels = ["A>>B", "A>B", "A=B", "B>A", "B>>A", None]
            label = generator.choices(labels, [1, 3, 2, 2 + seed, 1, 0.3])[0]
            if label is not None:
                verdict = judgments.verdict(f"[[{label}]]", 1 if game == 1 else 2)
                assert isinstance(verdict, Verdict)
                verdicts.append(verdict)
    outcomes = judgments.battles(verdicts)
    interval = judgments.battle_interval(outcomes)
    found = (judgments.win_rate(outcomes), interval.lower, interval.upper)
    assert tuple(round(value, 2) for value in found) == (score, lower, upper)
