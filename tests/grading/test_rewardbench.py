from __future__ import annotations

import math

import pytest

from nemotron4.grading import judgments


def test_rewardbench_weighs_mathematics_like_code() -> None:
    subsets = {subset: 1.0 for counts in judgments.SECTIONS.values() for subset in counts}
    assert judgments.section_scores(subsets)["overall"] == 100
    scores = judgments.section_scores(subsets | {"math-prm": 0.0})
    assert scores["reasoning"] == 50
    assert scores["overall"] == 87.5


def test_the_four_sections_average_to_the_published_overall() -> None:
    values = {"chat": 0.958, "chat_hard": 0.871, "safety": 0.915, "reasoning": 0.937}
    subsets = {subset: values[section] for section, counts in judgments.SECTIONS.items() for subset in counts}
    assert judgments.section_scores(subsets)["overall"] == pytest.approx(92.0, abs=0.05)


def test_a_missing_subset_leaves_its_section_unscored() -> None:
    subsets = {subset: 1.0 for counts in judgments.SECTIONS.values() for subset in counts}
    del subsets["hep-go"]
    scores = judgments.section_scores(subsets)
    assert math.isnan(scores["reasoning"])
    assert math.isnan(scores["overall"])
    assert scores["chat"] == 100


def test_ties_are_wrong_and_nan_is_unscored() -> None:
    assert judgments.prefers_chosen(1.0, 0.5).value == 1
    assert judgments.prefers_chosen(0.5, 0.5).value == 0
    assert not judgments.prefers_chosen(math.nan, 0.5).is_scored
