"""The 25 IFEval instruction checkers and their two readings, strict and loose (Zhou et al. 2023).

They decide as the published checkers do, including their oddities, because the benchmark is what those
checkers say. Where the original draws at random or depends on an unseeded library, a seed decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from nemotron4.errors import DataError, unknown_name
from nemotron4.grading.instructions import content, layout
from nemotron4.grading.instructions.arguments import Arguments
from nemotron4.grading.score import Score

Mode = Literal["strict", "loose"]
Checker = Callable[[str, Arguments, int], bool]

CHECKERS: Mapping[str, Checker] = {
    "change_case:capital_word_frequency": content.has_capital_words,
    "change_case:english_capital": content.is_english_capitals,
    "change_case:english_lowercase": content.is_english_lowercase,
    "combination:repeat_prompt": content.repeats_prompt,
    "combination:two_responses": content.has_two_responses,
    "detectable_content:number_placeholders": content.has_placeholders,
    "detectable_content:postscript": content.has_postscript,
    "detectable_format:constrained_response": layout.has_constrained_answer,
    "detectable_format:json_format": layout.is_json,
    "detectable_format:multiple_sections": layout.has_sections,
    "detectable_format:number_bullet_lists": layout.has_bullet_points,
    "detectable_format:number_highlighted_sections": layout.has_highlights,
    "detectable_format:title": layout.has_title,
    "keywords:existence": content.has_keywords,
    "keywords:forbidden_words": content.lacks_forbidden_words,
    "keywords:frequency": content.has_keyword_frequency,
    "keywords:letter_frequency": content.has_letter_frequency,
    "language:response_language": content.is_in_language,
    "length_constraints:nth_paragraph_first_word": layout.has_nth_paragraph_first_word,
    "length_constraints:number_paragraphs": layout.has_number_of_paragraphs,
    "length_constraints:number_sentences": layout.has_number_of_sentences,
    "length_constraints:number_words": layout.has_number_of_words,
    "punctuation:no_comma": content.has_no_comma,
    "startend:end_checker": content.ends_with_phrase,
    "startend:quotation": content.is_quoted,
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
