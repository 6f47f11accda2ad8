from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron4.errors import DataError
from nemotron4.grading import instructions
from nemotron4.grading.instructions import CHECKERS, check, follows, variants

pytest.importorskip("langdetect")
pytest.importorskip("nltk")

PARAGRAPHS = "One two.\n***\nThree four.\n***\nFive."
# instruction, arguments, a reply that follows it, a reply that does not
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["Maple", "river"]}, "The RIVER maples", "The river"),
    ("keywords:frequency", {"keyword": "ab", "frequency": 3, "relation": "at least"}, "ab ABab", "ab ab"),
    ("keywords:frequency", {"keyword": "ab", "frequency": 1, "relation": "less than"}, "a b", "ab"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "A Cat."),
    ("keywords:letter_frequency", {"letter": "Q", "let_frequency": 2, "let_relation": "at least"}, "Qq", "q"),
    ("language:response_language", {"language": "de"}, "Das Wetter ist heute sehr schön.", "The weather."),
    ("language:response_language", {"language": "hi"}, "आज मौसम बहुत अच्छा है।", "Das Wetter ist schön."),
    ("language:response_language", {"language": "kn"}, "123 ...", "the weather is nice"),  # no letters: held
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "Dr. No left.",
        "A. B c. D e!",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 3}, PARAGRAPHS, "One.\n\nTwo.\n\nThree."),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "***\nOne\n***\nTwo\n***",
        "One *** *** Two",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "at least"},
        "a well-read man",
        "two words",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Weekend"},
        'Hello.\n\n"WEEKEND, at last"',
        "Hello.\n\nThe weekend",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a]"),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "Bye.\n\nP.S. one more",
        "Bye. PS one more",
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\np. p. s", "Bye.\nP.S."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b"),
    ("detectable_format:constrained_response", {}, "Well. My answer is no.", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na\nSECTION two\nb",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<Poem of joy>>\nla", "<<   >> la"),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("combination:two_responses", {}, "****** one ****** two", "one ****** ****** two"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, " say hi. Hi!", "Sure. Say hi."),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, 'Done. any questions?"', "Any questions? No."),
    ("startend:quotation", {}, ' "quoted" ', '"open'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "U.S. now",
        "NO WAY",
    ),
    ("change_case:english_capital", {}, "THIS IS AN ENGLISH SENTENCE.", "THIS is an English sentence."),
    ("change_case:english_lowercase", {}, "this is an english sentence.", "This is an English sentence."),
    (
        "change_case:english_lowercase",
        {},
        "the cat sat on the mat.",
        "das ist ein deutscher satz ohne großes.",
    ),
    ("punctuation:no_comma", {}, "no commas; none、", "one, two"),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_each_checker_has_a_reply_that_follows_and_one_that_does_not(
    name: str, arguments: dict[str, Any], good: str, bad: str
) -> None:
    assert check(name, arguments, good)
    assert not check(name, arguments, bad)


GOLDEN = Path(__file__).parents[1] / "golden" / "ifeval_decisions.jsonl.gz"


def test_decisions_equal_those_of_the_published_checkers() -> None:
    """Instructions of IFEval (CC BY 4.0) with made-up replies, decided by its code with langdetect seed 0."""
    with gzip.open(GOLDEN, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert {name for row in rows for name in row["ids"]} == set(CHECKERS)
    for row in rows:
        given = (row["response"], row["ids"], row["arguments"])
        assert list(follows(*given, mode="strict")) == row["strict"], row
        assert list(follows(*given, mode="loose")) == row["loose"], row


def test_the_cases_cover_all_25_checkers() -> None:
    assert len(CHECKERS) == 25
    assert {name for name, *_ in CASES} == set(CHECKERS)


def test_a_blank_reply_follows_nothing() -> None:
    assert not any(check(name, arguments, " \n\t") for name, arguments, *_ in CASES)


def test_loose_forgives_a_frame_and_stars_that_strict_does_not() -> None:
    reply = 'Sure, here it is:\n"quoted"\nHope it helps.'
    quoted = (["startend:quotation"], [{}])
    assert follows(reply, *quoted, mode="strict") == (False,)
    assert follows(reply, *quoted, mode="loose") == (True,)
    assert follows('**"quoted"**', *quoted, mode="loose") == (True,)
    assert len(variants(reply)) == 8


def test_a_prompt_counts_only_if_every_instruction_holds() -> None:
    names = ["punctuation:no_comma", "detectable_format:title"]
    score = instructions.score("no comma", names, [{}, {}])
    assert score.value == 0
    assert list(score.parts.values()) == [1, 0]
    assert instructions.score("<<T>> no comma", names, [{}, {}]).value == 1


def test_the_letter_drawn_for_a_non_letter_depends_on_the_seed_only() -> None:
    arguments = {"letter": "#", "let_frequency": 1, "let_relation": "at least"}
    outcomes = {seed: check("keywords:letter_frequency", arguments, "aeiou", seed=seed) for seed in range(30)}
    again = {seed: check("keywords:letter_frequency", arguments, "aeiou", seed=seed) for seed in range(30)}
    assert outcomes == again
    assert set(outcomes.values()) == {True, False}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("keywords:exist", {}, "unknown instruction"),
        ("keywords:existence", {"keywords": []}, "keywords"),
        ("keywords:existence", {"keywords": ["("]}, "keywords:existence"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "around"}, "around"),
        ("length_constraints:number_words", {"relation": "at least"}, "num_words"),
    ],
)
def test_a_wrong_instruction_is_an_error_and_not_a_score(
    name: str, arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        check(name, arguments, "text")


def test_deeply_nested_json_is_not_followed_instead_of_a_crash() -> None:
    assert not check("detectable_format:json_format", {}, "[" * 100_000)


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=200))
def test_no_reply_makes_a_checker_raise_and_strict_implies_loose(response: str) -> None:
    for name, arguments, *_ in CASES:
        if follows(response, [name], [arguments]) == (True,):
            assert follows(response, [name], [arguments], mode="loose") == (True,)
