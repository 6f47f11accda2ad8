"""Checkers of what a reply says: words, letters, language, case, punctuation, beginning and end."""

from __future__ import annotations

import re

from nemotron4.grading.instructions import resources
from nemotron4.grading.instructions.arguments import Arguments, compares, integer, letter, text, texts


def has_keywords(response: str, arguments: Arguments, seed: int) -> bool:
    return all(re.search(word, response, re.IGNORECASE) for word in texts(arguments, "keywords"))


def has_keyword_frequency(response: str, arguments: Arguments, seed: int) -> bool:
    count = len(re.findall(text(arguments, "keyword").strip(), response, re.IGNORECASE))
    return compares(count, arguments, relation="relation", threshold="frequency")


def lacks_forbidden_words(response: str, arguments: Arguments, seed: int) -> bool:
    words = texts(arguments, "forbidden_words")
    return not any(re.search(rf"\b{word}\b", response, re.IGNORECASE) for word in words)


def has_letter_frequency(response: str, arguments: Arguments, seed: int) -> bool:
    count = response.lower().count(letter(arguments, seed=seed))
    return compares(count, arguments, relation="let_relation", threshold="let_frequency")


def is_in_language(response: str, arguments: Arguments, seed: int) -> bool:
    """A text without recognisable letters counts as followed, as in the original."""
    return resources.detect_language(response, seed=seed) in (text(arguments, "language"), None)


def has_capital_words(response: str, arguments: Arguments, seed: int) -> bool:
    count = sum(token.isupper() for token in resources.tokenize_words(response))
    return compares(count, arguments, relation="capital_relation", threshold="capital_frequency")


def is_english_capitals(response: str, arguments: Arguments, seed: int) -> bool:
    return response.isupper() and resources.detect_language(response, seed=seed) in ("en", None)


def is_english_lowercase(response: str, arguments: Arguments, seed: int) -> bool:
    return response.islower() and resources.detect_language(response, seed=seed) in ("en", None)


def has_no_comma(response: str, arguments: Arguments, seed: int) -> bool:
    return "," not in response


def ends_with_phrase(response: str, arguments: Arguments, seed: int) -> bool:
    phrase = text(arguments, "end_phrase").strip().lower()
    return response.strip().strip('"').lower().endswith(phrase)


def is_quoted(response: str, arguments: Arguments, seed: int) -> bool:
    response = response.strip()
    return len(response) > 1 and response[0] == response[-1] == '"'


def repeats_prompt(response: str, arguments: Arguments, seed: int) -> bool:
    prompt = text(arguments, "prompt_to_repeat").strip().lower()
    return response.strip().lower().startswith(prompt)


def has_two_responses(response: str, arguments: Arguments, seed: int) -> bool:
    """Two different texts around ``******``; only the outermost pieces may be blank."""
    pieces = [piece.strip() for piece in response.split("******")]
    if not all(pieces[1:-1]):
        return False
    answers = [piece for piece in pieces if piece]
    return len(answers) == 2 and answers[0] != answers[1]


def has_postscript(response: str, arguments: Arguments, seed: int) -> bool:
    marker = text(arguments, "postscript_marker").strip()
    spaced = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    pattern = spaced.get(marker, r"\s*" + marker.lower() + r".*$")
    return re.search(pattern, response.lower(), re.MULTILINE) is not None


def has_placeholders(response: str, arguments: Arguments, seed: int) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= integer(arguments, "num_placeholders")
