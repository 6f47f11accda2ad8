from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron4.grading import statistics


@pytest.mark.parametrize(
    ("numerator", "denominator", "lower", "upper"),
    [
        (11_051, 14_042, 78.0, 79.4),
        (1_217, 1_319, 90.7, 93.6),
        (120, 164, 65.9, 79.4),
        (432, 541, 76.3, 83.0),
    ],
)
def test_wilson_gives_the_reference_pages_intervals(
    numerator: int, denominator: int, lower: float, upper: float
) -> None:
    interval = statistics.wilson(numerator, denominator)
    assert (round(100 * interval.lower, 1), round(100 * interval.upper, 1)) == (lower, upper)


@given(st.integers(0, 500), st.integers(1, 500))
def test_wilson_contains_the_share(numerator: int, denominator: int) -> None:
    numerator = min(numerator, denominator)
    interval = statistics.wilson(numerator, denominator)
    assert 0 <= interval.lower <= numerator / denominator <= interval.upper <= 1


def test_wilson_without_items_knows_nothing() -> None:
    assert (statistics.wilson(0, 0).lower, statistics.wilson(0, 0).upper) == (0, 1)


def test_bootstrap_over_questions_is_wider_than_over_parts_that_agree() -> None:
    shares = np.random.default_rng(1).integers(0, 2, 80).astype(float)
    by_question = statistics.bootstrap_ratio(2 * shares, [2.0] * 80)
    by_part = statistics.bootstrap_ratio(np.repeat(shares, 2), [1.0] * 160)
    assert by_question.upper - by_question.lower > by_part.upper - by_part.lower
    assert by_question == statistics.bootstrap_ratio(2 * shares, [2.0] * 80)


def test_bootstrap_of_a_constant_is_the_constant() -> None:
    interval = statistics.bootstrap_ratio([3.0] * 10, [1.0] * 10)
    assert (interval.lower, interval.upper) == (3, 3)
    assert math.isnan(statistics.bootstrap_ratio([], []).lower)


def test_mcnemar_counts_only_flips() -> None:
    first = [True] * 50 + [False] * 10
    second = [True] * 50 + [True] * 9 + [False]
    test = statistics.mcnemar(first, second)
    assert test.difference == pytest.approx(9 / 60)
    assert test.p_value == pytest.approx(2 * 0.5**9)
    assert statistics.mcnemar(first, first).p_value == 1


def test_sign_flips_agree_with_the_exact_answer_on_a_small_case() -> None:
    test = statistics.sign_flips([0.0] * 4, [1.0] * 4)
    assert test.difference == 1
    assert test.p_value == pytest.approx(2 / 16, abs=0.02)
    assert statistics.sign_flips([1.0, 2.0], [1.0, 2.0]).p_value == 1


def test_f1_is_undefined_without_positives() -> None:
    assert statistics.f1(3, 1, 2) == pytest.approx((0.75, 0.6, 2 / 3))
    assert all(math.isnan(value) for value in statistics.f1(0, 0, 0))
