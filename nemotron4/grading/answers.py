"""Short final answers: GSM8K numbers (strict, flexible), MMLU letters, BBH's sentence, boxed mathematics.

The GSM8K patterns and their normalisation are those of lm-evaluation-harness' ``gsm8k_zeroshot_cot`` as
NVIDIA packages it (nvidia-lm-eval 26.3); MMLU is its ``mmlu_str``; BBH is the harness' ``bbh`` (version 4 of
its tasks); boxed answers follow the MATH evaluation (Hendrycks et al. 2021): the last box, compared in a
normal form.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from nemotron4.grading.score import Score, passed, unparsed

Gsm8kMethod = Literal["strict", "flexible", "value"]

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_EXPONENT = r"(?:[eE][+-]?\d{1,3}(?!\w))?"
_NUMBER = re.compile(
    rf"(?<![\w.])-?(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?{_EXPONENT}|(?<![\w.])-?\.\d+{_EXPONENT}"
)
_LETTERS = "ABCD"


def extract_gsm8k(response: str, method: Gsm8kMethod) -> str | None:
    """The final number as written. Strict: after the first ``#### ``; flexible: the last number-like run."""
    if method == "strict":
        match = _STRICT.search(response)
        return match.group(1).strip() if match else None
    last = None
    for found in _FLEXIBLE.finditer(response):
        last = found
    return (last.group(1) or last.group(2)).strip() if last else None


def final_number(response: str) -> Fraction | None:
    """The value of a text's last number: ``$57.00``, ``1,000 apples``, ``-3.``, ``1e-05`` are numbers."""
    found = [match[0] for match in _NUMBER.finditer(response.replace("\N{MINUS SIGN}", "-"))]
    return _value(found[-1].replace(",", "")) if found else None


def _value(number: str) -> Fraction | None:
    """None for more digits than Python reads (4,300): a model that loops writes such numbers."""
    try:
        return Fraction(number)
    except ValueError:
        return None


def normal_gsm8k(answer: str) -> str:
    """The form in which numbers are compared: no ``,`` or ``$``, nothing up to ``#### ``, no final ``.``."""
    answer = answer.replace(",", "").replace("$", "")
    answer = answer.rpartition("#### ")[2]
    return re.sub(r"\.$", "", answer).lower()


def gsm8k(response: str, answer: str, method: Gsm8kMethod = "strict") -> Score:
    """1 if the extracted number equals the reference, which is a number or a whole worked solution.

    ``strict`` and ``flexible`` compare the digits as published; ``value`` compares numbers.
    """
    if method == "value":
        value = final_number(response)
        if value is None:
            return unparsed("no final number")
        return passed(value == final_number(answer))
    extracted = extract_gsm8k(response, method)
    if extracted is None:
        return unparsed("no final number")
    return passed(normal_gsm8k(extracted) == normal_gsm8k(answer))


def extract_letter(response: str) -> str | None:
    """The choice: the first non-blank character, if it is A, B, C or D."""
    first = response.lstrip()[:1]
    return first if first and first in _LETTERS else None


def mmlu(response: str, answer: str) -> Score:
    """1 if the reply opens with the right letter; one that opens with no letter is wrong and unparsed."""
    letter = extract_letter(response)
    return (
        unparsed("the reply does not open with A, B, C or D") if letter is None else passed(letter == answer)
    )


_BBH = re.compile(r"(?<=the answer is )(.*)(?=.)")


def extract_bbh(response: str) -> str | None:
    """What is between the first ``the answer is `` and the last character of its line."""
    match = _BBH.search(response)
    return match.group(1).strip() if match else None


def bbh(response: str, answer: str) -> Score:
    """1 if the extracted answer is the reference, letter by letter."""
    extracted = extract_bbh(response)
    return unparsed('no "the answer is"') if extracted is None else passed(extracted == answer)


def extract_boxed(response: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}`` or ``\fbox{...}``, or of ``\boxed x``."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?:\s*(\{)|\s+([^\s$]+))", response))):
        if match.group(1) is None:
            return match.group(2)
        content = _balanced(response, match.end(1))
        if content is not None:
            return content
    return None


def _balanced(text: str, start: int) -> str | None:
    """The text from ``start`` to the brace that closes the one just before it."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


_SIMPLE_FRACTION = re.compile(r"^(-?)(\d+)/(\d+)$")
_LATEX_FRACTION = re.compile(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$")
_DECIMAL = re.compile(r"^-?(\d+\.?\d*|\.\d+)$")


def normal_math(answer: str) -> str:
    """A LaTeX answer without what does not change its value: spaces, units, ``\\left``, thousands."""
    answer = re.sub(r"\s*\\text\{[^{}]*\}\s*$", "", answer.replace("\n", ""))
    for unwanted in (
        "\\!",
        "\\,",
        "\\;",
        "\\ ",
        "\\left",
        "\\right",
        "^{\\circ}",
        "^\\circ",
        "\\$",
        "$",
        "\\%",
        "%",
    ):
        answer = answer.replace(unwanted, "")
    answer = answer.replace("tfrac", "frac").replace("dfrac", "frac")
    answer = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", answer)
    answer = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", answer)
    answer = re.sub(r"^[A-Za-z]\s*=\s*", "", answer)
    answer = answer.replace(" ", "").rstrip(".")
    return re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", answer)


def _as_fraction(answer: str) -> Fraction | None:
    for pattern in (_SIMPLE_FRACTION, _LATEX_FRACTION):
        if match := pattern.match(answer):
            above, below = _value(match.group(2)), _value(match.group(3))
            if above is not None and below:
                return (-1 if match.group(1) else 1) * above / below
    return _value(answer) if _DECIMAL.match(answer) else None


def boxed(response: str, answer: str) -> Score:
    """1 if the last boxed answer has the reference's normal form or its rational value."""
    extracted = extract_boxed(response)
    if extracted is None:
        return unparsed("no boxed answer")
    given, expected = normal_math(extracted), normal_math(answer)
    if given == expected:
        return passed(True)
    value = _as_fraction(given)
    return passed(value is not None and value == _as_fraction(expected))
