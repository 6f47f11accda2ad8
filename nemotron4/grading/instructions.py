"""The 25 IFEval instruction checkers and their two readings, strict and loose (Zhou et al. 2023).

They decide as the published checkers do, including their oddities, because the benchmark is what those
checkers say. Where the original draws at random or depends on an unseeded library, a seed decides.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from nemotron4.errors import DataError, unknown_name
from nemotron4.grading import language
from nemotron4.grading.score import Score

Arguments = Mapping[str, Any]


def integer(arguments: Arguments, name: str) -> int:
    value = arguments.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"argument {name!r} is {value!r}; expected an integer of 0 or more")
    return value


def text(arguments: Arguments, name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"argument {name!r} is {value!r}; expected a string")
    return value


def texts(arguments: Arguments, name: str) -> list[str]:
    value = arguments.get(name)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(word, str) for word in value):
        raise DataError(f"argument {name!r} is {value!r}; expected a list of strings")
    return list(value)


def compares(count: int, arguments: Arguments, *, relation: str, threshold: str) -> bool:
    """Whether the count is ``less than`` or ``at least`` the threshold that the arguments name."""
    wanted, limit = arguments.get(relation), integer(arguments, threshold)
    if wanted == "less than":
        return count < limit
    if wanted == "at least":
        return count >= limit
    raise DataError(f"argument {relation!r} is {wanted!r}; expected 'less than' or 'at least'")


def letter(arguments: Arguments, *, seed: int) -> str:
    """The letter to count, in lower case.

    Two prompts of the data ask for ``#`` and ``!``. The original then counts a letter drawn at random; the
    same draw is made here from the seed, so that a reply has one score.
    """
    value = arguments.get("letter")
    if isinstance(value, str) and len(value) == 1 and "a" <= value.lower() <= "z":
        return value.lower()
    return random.Random(f"{seed} {value}").choice(string.ascii_lowercase)


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
    return language.detect_language(response, seed=seed) in (text(arguments, "language"), None)


def has_capital_words(response: str, arguments: Arguments, seed: int) -> bool:
    count = sum(token.isupper() for token in language.tokenize_words(response))
    return compares(count, arguments, relation="capital_relation", threshold="capital_frequency")


def is_english_capitals(response: str, arguments: Arguments, seed: int) -> bool:
    return response.isupper() and language.detect_language(response, seed=seed) in ("en", None)


def is_english_lowercase(response: str, arguments: Arguments, seed: int) -> bool:
    return response.islower() and language.detect_language(response, seed=seed) in ("en", None)


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


CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def has_number_of_words(response: str, arguments: Arguments, seed: int) -> bool:
    count = language.count_words(response)
    return compares(count, arguments, relation="relation", threshold="num_words")


def has_number_of_sentences(response: str, arguments: Arguments, seed: int) -> bool:
    count = language.count_sentences(response)
    return compares(count, arguments, relation="relation", threshold="num_sentences")


def has_number_of_paragraphs(response: str, arguments: Arguments, seed: int) -> bool:
    """Paragraphs between ``***``; a blank one is allowed at either end only."""
    pieces = [piece.strip() for piece in re.split(r"\s?\*\*\*\s?", response)]
    if not all(pieces[1:-1]):
        return False
    return sum(bool(piece) for piece in pieces) == integer(arguments, "num_paragraphs")


def has_nth_paragraph_first_word(response: str, arguments: Arguments, seed: int) -> bool:
    """Paragraphs between blank lines. The n-th is found before blank ones are left out of the count."""
    paragraphs = response.split("\n\n")
    num_filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    position = integer(arguments, "nth_paragraph")
    if not 0 < position <= num_filled or not (paragraph := paragraphs[position - 1].strip()):
        return False
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    first_word = re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower()
    expected = text(arguments, "first_word").lower()
    return num_filled == integer(arguments, "num_paragraphs") and first_word == expected


def has_bullet_points(response: str, arguments: Arguments, seed: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", response, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", response, re.MULTILINE)
    return len(stars) + len(dashes) == integer(arguments, "num_bullets")


def has_constrained_answer(response: str, arguments: Arguments, seed: int) -> bool:
    return any(answer in response.strip() for answer in CONSTRAINED_ANSWERS)


def has_highlights(response: str, arguments: Arguments, seed: int) -> bool:
    """``*text*`` and ``**text**`` that are not blank; one highlight can count as both, as in the original."""
    single = re.findall(r"\*[^\n\*]*\*", response)
    double = re.findall(r"\*\*[^\n\*]*\*\*", response)
    count = sum(bool(found.strip("*").strip()) for found in single)
    count += sum(bool(found.removeprefix("**").removesuffix("**").strip()) for found in double)
    return count >= integer(arguments, "num_highlights")


def has_sections(response: str, arguments: Arguments, seed: int) -> bool:
    marker = text(arguments, "section_spliter").strip()
    return len(re.split(rf"\s?{marker}\s?\d+\s?", response)) - 1 >= integer(arguments, "num_sections")


def is_json(response: str, arguments: Arguments, seed: int) -> bool:
    """The whole reply, with or without a code fence around it."""
    response = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        response = response.removeprefix(fence)
    try:
        json.loads(response.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def has_title(response: str, arguments: Arguments, seed: int) -> bool:
    titles = re.findall(r"<<[^\n]+>>", response)
    return any(title.lstrip("<").rstrip(">").strip() for title in titles)


Mode = Literal["strict", "loose"]
Checker = Callable[[str, Arguments, int], bool]

CHECKERS: Mapping[str, Checker] = {
    "change_case:capital_word_frequency": has_capital_words,
    "change_case:english_capital": is_english_capitals,
    "change_case:english_lowercase": is_english_lowercase,
    "combination:repeat_prompt": repeats_prompt,
    "combination:two_responses": has_two_responses,
    "detectable_content:number_placeholders": has_placeholders,
    "detectable_content:postscript": has_postscript,
    "detectable_format:constrained_response": has_constrained_answer,
    "detectable_format:json_format": is_json,
    "detectable_format:multiple_sections": has_sections,
    "detectable_format:number_bullet_lists": has_bullet_points,
    "detectable_format:number_highlighted_sections": has_highlights,
    "detectable_format:title": has_title,
    "keywords:existence": has_keywords,
    "keywords:forbidden_words": lacks_forbidden_words,
    "keywords:frequency": has_keyword_frequency,
    "keywords:letter_frequency": has_letter_frequency,
    "language:response_language": is_in_language,
    "length_constraints:nth_paragraph_first_word": has_nth_paragraph_first_word,
    "length_constraints:number_paragraphs": has_number_of_paragraphs,
    "length_constraints:number_sentences": has_number_of_sentences,
    "length_constraints:number_words": has_number_of_words,
    "punctuation:no_comma": has_no_comma,
    "startend:end_checker": ends_with_phrase,
    "startend:quotation": is_quoted,
}


def check(instruction_id: str, arguments: Mapping[str, Any], response: str, *, seed: int = 0) -> bool:
    """Whether the reply follows one instruction. A blank reply follows none."""
    if instruction_id not in CHECKERS:
        message, hint = unknown_name("instruction", instruction_id, CHECKERS)
        raise DataError(message, hint=hint)
    try:
        return bool(response.strip()) and CHECKERS[instruction_id](response, arguments, seed)
    except DataError as error:
        raise DataError(f"instruction {instruction_id}: {error.message}", hint=error.hint) from error
    except re.error as error:
        raise DataError(f"instruction {instruction_id}: {error} in one of {dict(arguments)}") from error


def variants(response: str) -> tuple[str, ...]:
    """The eight loose readings: without first, last or both lines, each with and without ``*``."""
    lines = response.split("\n")
    cuts = (lines[1:], lines[:-1], lines[1:-1])
    readings = (response, *("\n".join(kept).strip() for kept in cuts))
    return (*readings, *(reading.replace("*", "") for reading in readings))


def follows(
    response: str,
    instruction_ids: Sequence[str],
    arguments: Sequence[Mapping[str, Any]],
    *,
    mode: Mode = "strict",
    seed: int = 0,
) -> tuple[bool, ...]:
    """One decision per instruction. Loose: any of the eight readings follows it."""
    if len(instruction_ids) != len(arguments):
        raise DataError(f"{len(instruction_ids)} instructions with {len(arguments)} sets of arguments")
    readings = (response,) if mode == "strict" else variants(response)
    return tuple(
        any(check(name, given, reading, seed=seed) for reading in readings)
        for name, given in zip(instruction_ids, arguments, strict=True)
    )


def score(
    response: str,
    instruction_ids: Sequence[str],
    arguments: Sequence[Mapping[str, Any]],
    *,
    mode: Mode = "strict",
    seed: int = 0,
) -> Score:
    """1 if all instructions are followed; ``parts`` has each one under ``position:id``."""
    decisions = follows(response, instruction_ids, arguments, mode=mode, seed=seed)
    parts = {
        f"{at}:{name}": float(held)
        for at, (name, held) in enumerate(zip(instruction_ids, decisions, strict=True))
    }
    return Score(value=float(all(decisions)), parts=parts)
