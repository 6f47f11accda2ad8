"""Checkers of how a reply is laid out: lengths, paragraphs, lists, sections, JSON, titles."""

from __future__ import annotations

import json
import re

from nemotron4.grading.instructions import resources
from nemotron4.grading.instructions.arguments import Arguments, compares, integer, text

CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def has_number_of_words(response: str, arguments: Arguments, seed: int) -> bool:
    count = resources.count_words(response)
    return compares(count, arguments, relation="relation", threshold="num_words")


def has_number_of_sentences(response: str, arguments: Arguments, seed: int) -> bool:
    count = resources.count_sentences(response)
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
