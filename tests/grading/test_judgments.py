from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron4.grading import judgments
from nemotron4.grading.judgments import Verdict


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("Rating: [[7]]", 7, 7),
        ("Another judge said [[3]], but I say [[8.5]]", 3, 8.5),
        ("Rating: [9]", 9, 9),
        ("see [1], Rating: [[4]]", 4, 4),
        ("評分：[[6]]", 6, 6),
        ("Rating: 7", None, None),
        ("Rating: [[seven]]", None, None),
        ("[[0]]", None, None),
        ("[[100]]", None, None),
        ("", None, None),
    ],
)
def test_ratings_are_read_from_double_then_single_brackets(
    text: str, first: float | None, last: float | None
) -> None:
    assert judgments.rating(text, "first").value == first
    assert judgments.rating(text).value == last


@pytest.mark.parametrize(
    ("text", "game_1", "game_2"),
    [
        ("[[A>>B]]", Verdict(0, 3), Verdict(1, 3)),
        ("My final verdict is: [[A>B]]", Verdict(0, 1), Verdict(1, 1)),
        ("[[A=B]] so again [[A=B]]", Verdict(0.5, 1), Verdict(0.5, 1)),
        ("[[B>A]]", Verdict(1, 1), Verdict(0, 1)),
        ("[[B>>A]]", Verdict(1, 3), Verdict(0, 3)),
    ],
)
def test_a_verdict_swaps_its_meaning_between_the_games(text: str, game_1: Verdict, game_2: Verdict) -> None:
    assert judgments.verdict(text, 1) == game_1
    assert judgments.verdict(text, 2) == game_2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A is better", "no verdict"),
        ("[[A>B]] or rather [[B>A]]", "verdicts disagree"),
        ("[[A>B]] [[A>>B]]", "verdicts disagree"),
        ("[[A<B]]", "unknown verdict label"),
        ("[[A]]", "unknown verdict label"),
        ("", "no verdict"),
    ],
)
def test_a_missing_or_contradictory_verdict_is_unscored(text: str, reason: str) -> None:
    score = judgments.verdict(text, 1)
    assert isinstance(score, judgments.Score)
    assert score.reason == reason


def test_preference_is_the_share_of_the_models_token() -> None:
    logprobs = {"m": math.log(0.2), "M": math.log(0.6), "The": math.log(0.2)}
    assert judgments.preference(logprobs, "M").value == pytest.approx(0.75)
    assert judgments.preference(logprobs, "m").value == pytest.approx(0.25)
    assert judgments.preference({"M": -3.0}, "M").value == 1
    assert judgments.preference({"M": -3.0}, "m").value == 0
    assert judgments.preference({"m": -1e9, "M": -1e9}, "m").value == 0.5


@pytest.mark.parametrize("logprobs", [{}, {"The": -0.1}, {"m": math.nan}, {"m": -math.inf, "M": -math.inf}])
def test_without_the_two_tokens_there_is_no_preference(logprobs: dict[str, float]) -> None:
    assert not judgments.preference(logprobs, "m").is_scored


def test_letter_log_odds_add_up_the_spellings_of_a_letter() -> None:
    logprobs = {"A": math.log(0.3), " A": math.log(0.1), "B": math.log(0.2), "The": math.log(0.1)}
    value = judgments.letter_log_odds(logprobs).value
    assert value == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        ({"A": math.log(0.6), "It": math.log(0.3)}, math.log(6)),  # all that is left is 0.1
        ({"A": math.log(0.6), "It": math.log(0.05)}, math.log(12)),  # less likely than "It"
        ({"The": math.log(0.6)}, None),
        ({}, None),
    ],
)
def test_a_letter_that_is_not_listed_is_bounded(logprobs: dict[str, float], expected: float | None) -> None:
    assert judgments.letter_log_odds(logprobs).value == (
        None if expected is None else pytest.approx(expected)
    )


def test_stored_preferences_count_zero_as_a_tie() -> None:
    assert judgments.stored_preference(0).value == 0.5
    assert judgments.stored_preference(2).value == 1
    assert not judgments.stored_preference(math.nan).is_scored
    assert not judgments.stored_preference(3).is_scored


@given(st.text() | st.text(alphabet="[]AB<>=0123456789."))
def test_no_judgment_makes_a_parser_raise(text: str) -> None:
    score = judgments.rating(text)
    assert score.value is None or 1 <= score.value <= 10
    for game in (1, 2):
        judgments.verdict(text, game)  # type: ignore[arg-type]


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_swapping_the_order_mirrors_the_preference(first: float, second: float) -> None:
    shown = judgments.preference({"m": first, "M": second}, "m").value
    swapped = judgments.preference({"m": second, "M": first}, "M").value
    assert shown == swapped
