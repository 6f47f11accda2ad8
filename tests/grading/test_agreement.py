"""Cohen's kappa against values worked out by hand."""

from __future__ import annotations

import pytest

from nemotron4.grading.statistics import cohen_kappa


def test_kappa_of_the_usual_example() -> None:
    # 20 yes/yes, 15 no/no, 5 and 10 apart: observed 0.7, by chance 0.5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = cohen_kappa(first, second, ["yes", "no"])
    assert found.kappa == pytest.approx(0.4)
    assert found.share_equal == pytest.approx(0.7)
    assert found.interval is not None
    assert found.interval.lower < 0.4 < found.interval.upper


def test_quadratic_weights_forgive_a_near_miss_more_than_a_far_one() -> None:
    first = [0, 1, 2, 3, 4]
    near = cohen_kappa(first, [1, 1, 2, 3, 4], range(5), weights="quadratic")
    far = cohen_kappa(first, [4, 1, 2, 3, 4], range(5), weights="quadratic")
    # Near: mean squared distance 1/5 observed; by chance 6 + 6.2 - 2 * 2 * 2.2 = 3.4.
    assert near.kappa == pytest.approx(1 - 0.2 / 3.4)
    assert far.kappa is not None
    assert near.kappa is not None
    assert far.kappa < near.kappa
    assert cohen_kappa(first, first, range(5), weights="quadratic").kappa == pytest.approx(1.0)


def test_kappa_is_not_invented_where_it_is_not_defined() -> None:
    assert cohen_kappa(["a", "a"], ["a", "a"], ["a", "b"]).kappa is None
    assert cohen_kappa([], [], ["a", "b"]).kappa is None
