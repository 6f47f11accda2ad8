from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron4.grading import answers

WORKED = "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18"


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        ("so 9*2.\n#### 18", 1, 1),
        ("#### $18", 0, 1),  # the strict pattern does not allow the dollar sign
        ("#### 18.", 1, 1),
        ("#### 18\n#### 19", 1, 0),  # strict takes the first match, flexible the last
        ("The answer is 18", 0, 1),
        ("The answer is eighteen", 0, 0),
        ("#### 18.0", 0, 0),  # compared as text, as in the original
        ("####18", 0, 1),
        ("答案是18個", 0, 1),
        ("الجواب هو 18", 0, 1),
        ("\\boxed{18}", 0, 1),
        ("", 0, 0),
        ("#### -18", 0, 0),
    ],
)
def test_gsm8k_strict_and_flexible_differ_where_the_patterns_do(
    response: str, strict: int, flexible: int
) -> None:
    assert answers.gsm8k(response, WORKED, "strict").value == strict
    assert answers.gsm8k(response, WORKED, "flexible").value == flexible


def test_gsm8k_ignores_thousands_separators_and_dollars() -> None:
    assert answers.gsm8k("#### 1,234", "x #### 1234").value == 1
    assert answers.gsm8k("about $1,234.", "x #### 1,234", "flexible").value == 1


def test_a_reply_without_a_number_is_wrong_and_unparsed() -> None:
    score = answers.gsm8k("I refuse.", "#### 3")
    assert score.value == 0
    assert score.is_unparsed
    assert not answers.gsm8k("#### 4", "#### 3").is_unparsed


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("  \n B. because", "B"),
        ("b", None),
        ("The answer is B", None),
        ("", None),
        ("(B)", None),
        ("Б", None),  # Cyrillic
        ("Banana", "B"),  # the first character decides
    ],
)
def test_mmlu_letter_is_the_first_visible_character(response: str, letter: str | None) -> None:
    assert answers.extract_letter(response) == letter
    score = answers.mmlu(response, "B")
    assert score.value == (letter == "B")
    assert score.is_unparsed == (letter is None)


@pytest.mark.parametrize(
    ("response", "expected", "is_right"),
    [
        (r"so $\boxed{\frac{1}{2}}$", r"\frac12", True),
        (r"\boxed{0.5}", r"\dfrac{1}{2}", True),
        (r"\boxed{1} then \boxed{2}", "2", True),
        (r"\boxed{1} then \boxed{2}", "1", False),
        (r"\boxed{10,000\text{ dollars}}", "10000", True),
        (r"\boxed{(1,2)}", "(1,2)", True),
        (r"\boxed{(1,2)}", "(12)", False),
        (r"\boxed{x = 3}", "3", True),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{\{1,2\}}", r"\{1,2\}", True),
        (r"\boxed 7", "7", True),
        (r"\boxed{\frac{0}{0}}", "1", False),
        (r"\boxed{5} and then \boxed{6", "5", True),  # the unfinished box is passed over
    ],
)
def test_boxed_answers_compare_by_normal_form_or_value(response: str, expected: str, is_right: bool) -> None:
    assert answers.boxed(response, expected).value == is_right


def test_no_box_is_unparsed() -> None:
    assert answers.boxed("the answer is 4", "4").is_unparsed


TEXT = (
    st.text()
    | st.text(alphabet="#$0123456789.,- \\boxed{}fracABCD\n")
    | st.text(alphabet="No. \n").map(lambda text: f"So the answer is {text}")
)


@given(TEXT)
def test_extraction_never_raises_and_is_idempotent(response: str) -> None:
    strict = answers.extract_gsm8k(response, "strict")
    if strict is not None:
        assert answers.extract_gsm8k(f"#### {strict}", "strict") == strict
    flexible = answers.extract_gsm8k(response, "flexible")
    if flexible is not None:
        assert answers.extract_gsm8k(flexible, "flexible") == flexible
    letter = answers.extract_letter(response)
    if letter is not None:
        assert answers.extract_letter(letter) == letter
    sentence = answers.extract_bbh(response)
    if sentence and "the answer is" not in sentence:
        assert answers.extract_bbh(f"So the answer is {sentence}.") == sentence
    boxed = answers.extract_boxed(response)
    if boxed is not None and "boxed" not in boxed and boxed.count("{") == boxed.count("}"):
        assert answers.extract_boxed(f"\\boxed{{{boxed}}}") == boxed


@given(TEXT, TEXT)
def test_scores_are_zero_or_one_for_any_text(response: str, expected: str) -> None:
    assert answers.gsm8k(response, expected).value in (0, 1)
    assert answers.gsm8k(response, expected, "flexible").value in (0, 1)
    assert answers.mmlu(response, expected).value in (0, 1)
    assert answers.boxed(f"\\boxed{{{response}}}", expected).value in (0, 1)


@pytest.mark.parametrize(
    ("response", "answer", "is_right"),
    [
        ("She makes $57.00.", "#### 57", True),
        ("1,000 apples", "1000", True),
        ("It is 6.50 dollars", "6.5", True),
        ("#### 12\nThat is 12 apples in 3 boxes", "12", False),  # the last number counts
        ("10-3=7", "7", True),
        ("-3.", "-3", True),
        ("57.01", "57", False),
    ],
)
def test_numbers_are_compared_by_value(response: str, answer: str, is_right: bool) -> None:
    assert answers.gsm8k(response, answer, "value").value == float(is_right)


def test_without_a_number_a_reply_is_unparsed_by_value_too() -> None:
    assert answers.gsm8k("no idea", "57", "value").is_unparsed


def test_a_number_of_thousands_of_digits_is_wrong_and_ends_nothing() -> None:
    digits = "7" * 5000  # what a looping model writes; Python reads 4,300
    assert answers.gsm8k(f"It is {digits}", "#### 7", "value").value == 0
    for boxed in (digits, f"1/{digits}", f"\\frac{{{digits}}}{{3}}", f"0.{digits}"):
        assert answers.boxed(f"\\boxed{{{boxed}}}", "7").value == 0
