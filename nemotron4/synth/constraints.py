"""Verifiable instructions: drawing one of the 25 IFEval types with arguments, in words, without conflicts.

The arguments are those of ``nemotron4.grading.instructions``, which decides whether an answer follows them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

from nemotron4.records import JsonObject
from nemotron4.synth.rows import Constraint

Drawn = tuple[JsonObject, str]  # arguments, sentence
_STOP_WORDS = frozenset(
    [
        "about",
        "above",
        "after",
        "again",
        "could",
        "every",
        "first",
        "great",
        "other",
        "should",
        "their",
        "there",
        "these",
        "thing",
        "think",
        "those",
        "three",
        "under",
        "where",
        "which",
        "while",
        "would",
        "write",
        "please",
        "answer",
        "question",
        "explain",
        "describe",
    ]
)
_RARE_WORDS = (
    "bridge", "compass", "harvest", "lantern", "mirror", "orchard", "pattern", "river", "signal", "thread",
)  # fmt: skip
_LANGUAGES = {"de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese"}
_ENDINGS = (
    "Is there anything else you would like to know?",
    "That is all for today.",
    "Thank you for reading.",
)


def _words(prompt: str, draw: random.Random, number: int) -> list[str]:
    """Plain lower-case words of the prompt, filled up from a fixed list."""
    found = sorted(set(re.findall(r"\b[a-z]{5,10}\b", prompt)) - _STOP_WORDS)
    chosen = draw.sample(found, min(number, len(found)))
    spare = [word for word in _RARE_WORDS if word not in chosen]
    return chosen + draw.sample(spare, number - len(chosen))


def _relation(draw: random.Random) -> tuple[str, str]:
    """The registry's word and ours."""
    return draw.choice((("at least", "at least"), ("less than", "fewer than")))


def _fixed(text: str) -> Callable[[random.Random, str], Drawn]:
    """A constraint without parameters."""
    return lambda draw, prompt: ({}, text)


def _existence(draw: random.Random, prompt: str) -> Drawn:
    words = _words(prompt, draw, draw.randint(1, 3))
    return {"keywords": words}, f"Use the following words in your answer: {', '.join(words)}."


def _frequency(draw: random.Random, prompt: str) -> Drawn:
    word, (relation, said), number = _words(prompt, draw, 1)[0], _relation(draw), draw.randint(2, 4)
    return (
        {"keyword": word, "relation": relation, "frequency": number},
        f'Let the word "{word}" occur {said} {number} times.',
    )


def _forbidden(draw: random.Random, prompt: str) -> Drawn:
    words = draw.sample(_RARE_WORDS, 2) + _words(prompt, draw, 1)
    words = list(dict.fromkeys(words))
    return {"forbidden_words": words}, f"Do not use any of these words: {', '.join(words)}."


def _letters(draw: random.Random, prompt: str) -> Drawn:
    letter, (relation, said), number = draw.choice("bcdfgkmpvwz"), _relation(draw), draw.randint(3, 12)
    return (
        {"letter": letter, "let_relation": relation, "let_frequency": number},
        f'The letter "{letter}" should occur {said} {number} times in your answer.',
    )


def _language(draw: random.Random, prompt: str) -> Drawn:
    code, name = draw.choice(list(_LANGUAGES.items()))
    return {"language": code}, f"Write the whole answer in {name} and in no other language."


def _sentences(draw: random.Random, prompt: str) -> Drawn:
    (relation, said), number = _relation(draw), draw.randint(3, 10)
    return {"relation": relation, "num_sentences": number}, f"Write {said} {number} sentences."


def _paragraphs(draw: random.Random, prompt: str) -> Drawn:
    number = draw.randint(2, 5)
    return (
        {"num_paragraphs": number},
        f"Write exactly {number} paragraphs and put a line with three asterisks (***) between them.",
    )


def _num_words(draw: random.Random, prompt: str) -> Drawn:
    (relation, said), number = _relation(draw), draw.choice((40, 60, 80, 100, 150, 200))
    return {"relation": relation, "num_words": number}, f"Write {said} {number} words."


def _nth_paragraph(draw: random.Random, prompt: str) -> Drawn:
    number = draw.randint(2, 4)
    position, word = draw.randint(1, number), draw.choice(("Today", "However", "Finally", "Some", "Often"))
    return (
        {"num_paragraphs": number, "nth_paragraph": position, "first_word": word.lower()},
        f"Write exactly {number} paragraphs with an empty line between them, and begin paragraph {position} "
        f'with the word "{word}".',
    )


def _placeholders(draw: random.Random, prompt: str) -> Drawn:
    number = draw.randint(2, 5)
    return (
        {"num_placeholders": number},
        f"Put at least {number} placeholders in square brackets into the answer, such as [name].",
    )


def _postscript(draw: random.Random, prompt: str) -> Drawn:
    marker = draw.choice(("P.S.", "P.P.S"))
    return {"postscript_marker": marker}, f"Add a postscript at the end that begins with {marker}"


def _bullets(draw: random.Random, prompt: str) -> Drawn:
    number = draw.randint(2, 6)
    return (
        {"num_bullets": number},
        f'Give exactly {number} bullet points, each on a line that begins with "* ".',
    )


def _highlights(draw: random.Random, prompt: str) -> Drawn:
    number = draw.randint(2, 4)
    return (
        {"num_highlights": number},
        f"Highlight at least {number} parts of the answer with asterisks, as in *highlighted part*.",
    )


def _sections(draw: random.Random, prompt: str) -> Drawn:
    number, marker = draw.randint(2, 4), draw.choice(("Section", "PART"))
    return (
        {"section_spliter": marker, "num_sections": number},
        f"Divide the answer into at least {number} sections and begin each with {marker} and its number, "
        f"as in {marker} 1.",
    )


def _repeat(draw: random.Random, prompt: str) -> Drawn:
    return (
        {"prompt_to_repeat": prompt},
        "First repeat the request above word for word, with nothing before it, then answer it. "
        "This and the following instructions are not part of what is to be repeated.",
    )


def _ending(draw: random.Random, prompt: str) -> Drawn:
    phrase = draw.choice(_ENDINGS)
    return {
        "end_phrase": phrase
    }, f'End the answer with exactly this sentence and nothing after it: "{phrase}"'


def _capital_words(draw: random.Random, prompt: str) -> Drawn:
    (relation, said), number = _relation(draw), draw.randint(2, 8)
    return (
        {"capital_relation": relation, "capital_frequency": number},
        f"Write {said} {number} words wholly in capital letters.",
    )


DRAWERS: Mapping[str, Callable[[random.Random, str], Drawn]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _num_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _fixed(
        "Answer with one of these: 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'"
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _fixed(
        "Write the whole answer as valid JSON. A code fence around it is allowed."
    ),
    "detectable_format:title": _fixed(
        "Give the answer a title in double angle brackets, as in <<a day at sea>>."
    ),
    "combination:two_responses": _fixed(
        "Give two different answers and put six asterisks (******) between them, and nowhere else."
    ),
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _ending,
    "startend:quotation": _fixed("Put the whole answer between double quotation marks."),
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _fixed("Write the whole answer in English and in capital letters only."),
    "change_case:english_lowercase": _fixed(
        "Write the whole answer in English and in lowercase letters only."
    ),
    "punctuation:no_comma": _fixed("Do not use any comma."),
}

_LONE = frozenset({"detectable_format:constrained_response", "combination:repeat_prompt"})
_WHOLE_FORM = frozenset(
    {"detectable_format:json_format", "startend:quotation", "combination:two_responses",
     "startend:end_checker", "detectable_content:postscript"}
)  # fmt: skip
_CASE = frozenset(
    {"change_case:english_capital", "change_case:english_lowercase", "change_case:capital_word_frequency"}
)
_WORDS = frozenset(name for name in DRAWERS if name.startswith("keywords:"))
_LAYOUT = frozenset(
    {"length_constraints:number_paragraphs", "length_constraints:nth_paragraph_first_word",
     "detectable_format:number_bullet_lists", "detectable_format:multiple_sections",
     "detectable_format:number_highlighted_sections", "detectable_format:json_format",
     "combination:two_responses"}
)  # fmt: skip
_LENGTH = frozenset({"length_constraints:number_sentences", "length_constraints:number_words"})
# Groups of which an answer can serve one at a time; a language other than English excludes what is English.
_GROUPS = (_WHOLE_FORM, _CASE, _LAYOUT, _LENGTH, _WORDS)
_ENGLISH = (
    _CASE
    | _WORDS
    | frozenset(
        {"startend:end_checker", "detectable_content:postscript", "detectable_format:multiple_sections",
         "length_constraints:nth_paragraph_first_word"}
    )
)  # fmt: skip
_OPPOSITES = (
    ("punctuation:no_comma", "detectable_format:json_format"),
    ("change_case:english_lowercase", "startend:end_checker"),
    ("change_case:english_lowercase", "detectable_content:postscript"),
    ("change_case:english_lowercase", "detectable_format:multiple_sections"),
    ("change_case:english_lowercase", "length_constraints:nth_paragraph_first_word"),
    ("change_case:english_capital", "detectable_format:multiple_sections"),
    ("change_case:english_capital", "keywords:letter_frequency"),
    ("change_case:english_lowercase", "keywords:letter_frequency"),
)


def conflicts(first: str, second: str) -> bool:
    """Whether two types cannot, or cannot naturally, hold for one answer."""
    pair = {first, second}
    if len(pair) == 1 or pair & _LONE:
        return True
    if "language:response_language" in pair and pair & _ENGLISH:
        return True
    return any(len(pair & group) == 2 for group in _GROUPS) or any(pair == set(two) for two in _OPPOSITES)


def draw_constraints(
    prompt: str, number: int, draw: random.Random, types: Sequence[str] = tuple(DRAWERS)
) -> tuple[Constraint, ...]:
    """Up to ``number`` constraints of different types without a conflict; fewer only if no more fit."""
    order = draw.sample(sorted(types), len(types))
    chosen: list[str] = []
    for name in order:
        if len(chosen) < number and not any(conflicts(name, other) for other in chosen):
            chosen.append(name)
    made = []
    for name in chosen:
        arguments, text = DRAWERS[name](draw, prompt)
        made.append(Constraint(type=name, arguments=arguments, text=text))
    return tuple(made)
