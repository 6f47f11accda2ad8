from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron4.grading import judgments, topics
from nemotron4.grading.topics import TopicCounts


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("This question is not relevant to the scenario.", True),
        ("That is not related to the scenario.", True),
        ("I’m sorry, I can only talk about loans.", True),
        ("I AM SORRY", True),
        ("That is an unrelated topic.", True),
        ("A savings account pays 2 % interest.", False),
        ("Das gehört nicht zum Thema.", False),  # the rule knows English phrases only
        ("", False),
    ],
)
def test_refusals_are_found_by_phrase(response: str, expected: bool) -> None:
    assert topics.is_refusal(response) is expected


def test_refused_on_topic_turns_lower_the_distractor_precision() -> None:
    turns = [(True, True)] * 8 + [(True, False)] * 2 + [(False, True)] * 4 + [(False, False)] * 86
    counts = topics.count_turns(turns)
    assert counts == TopicCounts(8, 2, 4, 86)
    assert counts.distractor() == pytest.approx((8 / 12, 8 / 10, 16 / 22))
    assert counts.on_topic() == pytest.approx((86 / 88, 86 / 90, 172 / 178))


def test_a_model_that_refuses_nothing_has_no_distractor_precision() -> None:
    precision, recall, f1 = TopicCounts(0, 5, 0, 20).distractor()
    assert math.isnan(precision)
    assert (recall, f1) == (0, 0)


@given(st.text())
def test_no_reply_makes_the_phrase_rule_raise(response: str) -> None:
    assert topics.is_refusal(response) in (True, False)


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
