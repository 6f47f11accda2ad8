"""Rows for verifiable instructions: a good answer is edited until it follows them, or they are read off it.

Every row has one to three instructions, in words of ours, and was checked by the grader of IFEval.
"""

from __future__ import annotations

import json
import random
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks import HELD_OUT, WRITING_FORMS

from nemotron4.grading.instructions import follows
from nemotron4.synth.constraints import DRAWERS, conflicts

Wanted = dict[str, Any]
Kept = Sequence[tuple[Mapping[str, Any], str]]
PLACES = [
    "[name]", "[date]", "[address]", "[place]", "[number]", "[time]", "[phone]", "[title]", "[company]",
    "[city]", "[price]", "[reason]",
]  # fmt: skip
COMMON = [
    "amazing",
    "beautiful",
    "best",
    "important",
    "incredible",
    "life",
    "nature",
    "people",
    "time",
    "world",
]
YES_NO = ("Is it a good idea to learn about {}?", "Do most people like {}?", "Will {} matter in ten years?")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_WORDS = tomllib.loads(Path(__file__).with_name("phrases.toml").read_text(encoding="utf-8"))
FORMS: Sequence[str] = _WORDS["forms"]
PHRASES: Mapping[str, Sequence[str]] = _WORDS["phrases"]
HELD_OUT_PHRASES: Mapping[str, Sequence[str]] = _WORDS["held_out"]
ENDINGS, FIRST_WORDS = _WORDS["endings"], _WORDS["first_words"]
REPEAT, CHOICE = "combination:repeat_prompt", "detectable_format:constrained_response"


def sentences(text: str) -> list[str]:
    return [part.strip() for part in re.findall(r"[^.!?]+[.!?]+", " ".join(text.split()))]


# ---- Edits: (text, what is wanted) -> text. They are made in this order, layout before case before wrapping.


def _nth(text: str, wanted: Wanted) -> str:
    parts = sentences(text)[: wanted["num_paragraphs"]]
    at = wanted["nth_paragraph"] - 1
    if at < len(parts):
        parts[at] = f"{wanted['first_word'].capitalize()}, {parts[at][0].lower()}{parts[at][1:]}"
    return "\n\n".join(parts)


def _sections(text: str, wanted: Wanted) -> str:
    parts = sentences(text)[: wanted["num_sections"]]
    return "\n\n".join(f"{wanted['section_spliter']} {n}\n{part}" for n, part in enumerate(parts, 1))


def _highlights(text: str, wanted: Wanted) -> str:
    words = list(dict.fromkeys(re.findall(r"\b[a-z]{6,}\b", text)))[: wanted["num_highlights"]]
    for word in words:
        text = re.sub(rf"\b{word}\b", f"*{word}*", text, count=1)
    return text


def _capital_words(text: str, wanted: Wanted) -> str:
    if wanted["capital_relation"] == "less than":
        return text
    words = list(dict.fromkeys(re.findall(r"\b[a-z]{5,}\b", text)))[: wanted["capital_frequency"]]
    for word in words:
        text = re.sub(rf"\b{word}\b", word.upper(), text, count=1)
    return text


def _two(text: str, wanted: Wanted) -> str:
    parts = sentences(text)
    half = max(1, len(parts) // 2)
    return " ".join(parts[:half]) + "\n******\n" + " ".join(parts[half:])


def _title(text: str, wanted: Wanted) -> str:
    words = sorted(set(re.findall(r"\b[a-z]{4,}\b", text)), key=lambda word: (-len(word), word))
    return f"<<{' and '.join(words[:2])}>>\n\n{text}"


EDITS: Mapping[str, Callable[[str, Wanted], str]] = {
    "detectable_format:number_bullet_lists": lambda text, wanted: "\n".join(
        f"* {part}" for part in sentences(text)[: wanted["num_bullets"]]
    ),
    "length_constraints:number_paragraphs": lambda text, wanted: "\n\n***\n\n".join(
        sentences(text)[: wanted["num_paragraphs"]]
    ),
    "length_constraints:nth_paragraph_first_word": _nth,
    "detectable_format:multiple_sections": _sections,
    "combination:two_responses": _two,
    "detectable_content:number_placeholders": lambda text, wanted: (
        f"{text}\n\n{' '.join(PLACES[: wanted['num_placeholders']])}"
    ),
    "detectable_format:number_highlighted_sections": _highlights,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_lowercase": lambda text, wanted: text.lower(),
    "change_case:english_capital": lambda text, wanted: text.upper(),
    "detectable_format:title": _title,
    "detectable_content:postscript": lambda text, wanted: (
        f"{text}\n\n{wanted['postscript_marker']} I hope this helps."
    ),
    "punctuation:no_comma": lambda text, wanted: text.replace(",", ""),
    "startend:end_checker": lambda text, wanted: f"{text} {wanted['end_phrase']}",
    "detectable_format:json_format": lambda text, wanted: (
        "```json\n" + json.dumps({"answer": text}) + "\n```"
    ),
    "startend:quotation": lambda text, wanted: '"' + text.replace('"', "") + '"',
    REPEAT: lambda text, wanted: f"{wanted['prompt_to_repeat']}\n\n{text}",
    CHOICE: lambda text, wanted: text,
}  # fmt: skip


# ---- What is read off an answer: (draw, text) -> what is wanted, or None where nothing fits.


def _words(text: str) -> list[str]:
    return re.findall(r"\b[a-z]{5,}\b", text.lower())


def _existence(draw: random.Random, text: str) -> Wanted | None:
    words = sorted(set(_words(text)))
    return {"keywords": draw.sample(words, draw.randint(1, 3))} if len(words) > 3 else None


def _frequency(draw: random.Random, text: str) -> Wanted | None:
    counts = [(word, number) for word, number in Counter(_words(text)).items() if number > 1]
    if not counts:
        return None
    word, number = draw.choice(counts)
    at_least = {"keyword": word, "relation": "at least", "frequency": number}
    return draw.choice((at_least, at_least, {**at_least, "relation": "less than", "frequency": number + 1}))


def _forbidden(draw: random.Random, text: str) -> Wanted | None:
    words = [word for word in COMMON if word not in text.lower()]
    return {"forbidden_words": draw.sample(words, draw.randint(1, 3))} if len(words) > 2 else None


def _letters(draw: random.Random, text: str) -> Wanted | None:
    letter, number = draw.choice("abcdefghijklmnopqrstuvwxyz"), 0
    number = text.lower().count(letter)
    if number > 2 and draw.random() < 0.6:
        return {"letter": letter, "let_relation": "at least", "let_frequency": number - draw.randint(0, 2)}
    return {"letter": letter, "let_relation": "less than", "let_frequency": number + draw.randint(1, 4)}


def _num_sentences(draw: random.Random, text: str) -> Wanted | None:
    number = len(sentences(text))
    if draw.random() < 0.5:
        return {"relation": "at least", "num_sentences": number}
    return {"relation": "less than", "num_sentences": number + draw.randint(1, 3)}


def _num_words(draw: random.Random, text: str) -> Wanted | None:
    number = len(re.findall(r"\w+", text))
    if number >= 20 and draw.random() < 0.6:
        return {"relation": "at least", "num_words": number // 10 * 10}
    return {"relation": "less than", "num_words": (number // 10 + draw.randint(1, 5)) * 10}


READ: Mapping[str, Callable[[random.Random, str], Wanted | None]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_sentences": _num_sentences,
    "length_constraints:number_words": _num_words,
}
# No language but English: the base writes no other.
NAMES = (*EDITS, *READ)
# How many rows of a kind stand beside one of another. The first nine were followed in less than 20 % of
# what the policy of an earlier run drew, after 58 rows of each; what it had learned has 1.
WEIGHTS: Mapping[str, int] = dict.fromkeys(NAMES, 1) | {
    "length_constraints:nth_paragraph_first_word": 3,
    "change_case:english_lowercase": 3,
    "change_case:english_capital": 3,
    "startend:end_checker": 3,
    "startend:quotation": 3,
    REPEAT: 3,
    "detectable_format:number_bullet_lists": 3,
    "detectable_format:number_highlighted_sections": 3,
    "keywords:existence": 3,
    "punctuation:no_comma": 2,
    "combination:two_responses": 2,
    "length_constraints:number_paragraphs": 2,
    "keywords:frequency": 2,
    "keywords:forbidden_words": 2,
}  # fmt: skip
# Of many parts, which greedy answers of a policy repeat without an end; the numbers to draw from.
MANY: Mapping[str, tuple[str, int, int]] = {
    "detectable_content:number_placeholders": ("num_placeholders", 5, 12),
    "detectable_format:number_highlighted_sections": ("num_highlights", 4, 10),
    "detectable_format:number_bullet_lists": ("num_bullets", 4, 9),
    "detectable_format:multiple_sections": ("num_sections", 3, 7),
}
LANGUAGE = "language:response_language"
# The base writes none of them well; that an answer ends can be learned.
LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "de": "German", "fa": "Persian", "fr": "French", "hi": "Hindi",
    "ko": "Korean", "ru": "Russian", "sw": "Swahili", "ta": "Tamil", "th": "Thai", "vi": "Vietnamese",
}  # fmt: skip
# These need a sentence for each part.
_IN_PARTS = frozenset(name for name in EDITS if "number_" in name or "nth" in name or "sections" in name)


# ---- Rows.


def shorter(draw: random.Random, text: str, *, is_short: bool) -> str:
    """The first sentences; a long text with lines stays whole."""
    if is_short:
        text = next((part for part in text.split("\n\n") if len(part.split()) > 7), text)
        return " ".join(sentences(text)[: draw.randint(1, 3)]) or text
    return text if "\n" in text else " ".join(sentences(text)[: draw.randint(2, 6)])


def edited(kept: Kept, number: int, *, seed: int = 5) -> list[tuple[dict[str, Any], str]]:
    """``number`` (task, answer) rows of answers to plain questions, of each kind as ``WEIGHTS`` says.

    Most have one instruction and are short: the words where it shows are then a large part of the row.
    """
    draw, used, made = random.Random(seed), Counter(dict.fromkeys(NAMES, 0)), []
    for _ in range(20 * number):
        if len(made) == number or not kept:
            break
        task, answer = draw.choice(kept)
        chosen = chosen_names(draw, used, WEIGHTS, (7, 2, 1))
        question = task["question"]
        if CHOICE in chosen:
            question, answer = draw.choice(YES_NO).format(task["check"]["topic"]), draw.choice(OPTIONS)
        is_short = draw.random() < 0.7 and not _IN_PARTS & {*chosen}
        found = _follow(draw, chosen, question, shorter(draw, answer, is_short=is_short))
        if found is None:
            continue
        text, wanted = found
        used.update(chosen)
        made.append((wish(draw, question, chosen, wanted), text))
    return made


def of_length(task: Mapping[str, Any], text: str) -> tuple[dict[str, Any], str] | None:
    """A long answer as the answer to the wish for so many words or sentences."""
    draw = random.Random(text)
    name = draw.choice(("length_constraints:number_words",) * 2 + ("length_constraints:number_sentences",))
    wanted = {"relation": "at least", "num_words": len(text.split()) // 50 * 50}
    if name.endswith("sentences"):
        wanted = {"relation": "at least", "num_sentences": max(3, len(sentences(text)) - draw.randint(0, 3))}
    made = wish(draw, task["question"], [name], [wanted])
    return (made, text) if all(follows(text, [name], [wanted])) else None


def chosen_names(
    draw: random.Random,
    used: Mapping[str, int],
    weights: Mapping[str, int] | None = None,
    others: Sequence[int] = (5, 3, 2),
) -> list[str]:
    """One of the kinds that are used least, and none to two others that go with it."""
    known = list(used)
    shares = {name: used[name] // (weights or {}).get(name, 1) for name in known}
    least = min(shares.values())
    names = [draw.choice([name for name in known if shares[name] <= least + 1])]
    for _ in range(draw.choices((0, 1, 2), others)[0]):
        other = draw.choice(known)
        if not any(conflicts(other, name) for name in names):
            names.append(other)
    return sorted(names, key=NAMES.index)


def drawn(draw: random.Random, name: str, question: str) -> Wanted:
    """Arguments, those of free words from lists of ours."""
    found: Wanted = dict(DRAWERS[name](draw, question)[0])
    if "end_phrase" in found:
        found["end_phrase"] = draw.choice(ENDINGS)
    if "first_word" in found:
        found["first_word"] = draw.choice(FIRST_WORDS)
    return found


def _follow(
    draw: random.Random, names: Sequence[str], question: str, text: str
) -> tuple[str, list[Wanted]] | None:
    """The text that follows them all, and their arguments in the order of the names."""
    wanted: list[Wanted] = []
    for name in names:
        found = READ[name](draw, text) if name in READ else drawn(draw, name, question)
        if found is None:
            return None
        wanted.append(found)
        text = EDITS[name](text, found) if name in EDITS else text
    return (text, wanted) if all(follows(text, names, wanted)) else None


def mended(task: Mapping[str, Any], text: str) -> str:
    """The answer after an edit for each instruction that it does not follow, where there is one."""
    for name, wanted in zip(task["check"]["ids"], task["check"]["kwargs"], strict=True):
        if name in EDITS and not all(follows(text, [name], [wanted])):
            text = EDITS[name](text, wanted)
    return text


def wish(
    draw: random.Random,
    question: str,
    names: Sequence[str],
    wanted: Sequence[Wanted],
    phrases: Mapping[str, Sequence[str]] = PHRASES,
) -> dict[str, Any]:
    """The task whose question has the instructions in words."""
    said = [
        draw.choice(phrases[name]).format(**{key: _said(value) for key, value in each.items()})
        for name, each in zip(names, wanted, strict=True)
    ]
    # Only these forms make clear which words are to be repeated.
    form = draw.choice((FORMS[0], FORMS[0], FORMS[2]) if REPEAT in names else FORMS)
    text = form.format(
        prompt=question, constraints=" ".join(said), listed="\n".join(f"- {one}" for one in said)
    )
    return {"kind": "instruction", "question": text, "check": {"ids": [*names], "kwargs": [*wanted]}}


def _said(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value


def wishes(asked: Iterable[Mapping[str, Any]], draw: random.Random) -> list[dict[str, Any]]:
    """New tasks without answers, of plain ones: what a policy is asked in a round."""
    used: Counter[str] = Counter(dict.fromkeys(NAMES, 0))
    made = []
    for task in asked:
        names, question = chosen_names(draw, used), task["question"]
        if CHOICE in names:
            question = draw.choice(YES_NO).format(task["check"]["topic"])
        used.update(names)
        wanted = [drawn(draw, name, question) for name in names]
        made.append(wish(draw, question, names, wanted))
    return made


def hard_wishes(asked: Iterable[Mapping[str, Any]], draw: random.Random) -> list[dict[str, Any]]:
    """New tasks of up to three instructions, one of ``MANY``; every sixth is for another language alone."""
    made = []
    for number, task in enumerate(asked):
        question, many = task["question"], draw.choice(list(MANY))
        if number % 6 == 0:
            code, language = draw.choice(list(LANGUAGES.items()))
            said = {LANGUAGE: (f"Write the whole answer in {language}.",)}
            made.append(wish(draw, question, [LANGUAGE], [{"language": code}], said))
            continue
        chosen = [many]
        for other in (draw.choice(list(MANY)), draw.choice([name for name in NAMES if name not in MANY])):
            chosen += [] if any(conflicts(other, name) for name in chosen) else [other]
        wanted = [drawn(draw, name, question) for name in chosen]
        field, least, most = MANY[many]
        wanted[0][field] = draw.randint(least, most)
        made.append(wish(draw, question, chosen, wanted))
    return made


def held_out_wishes(each: int) -> list[dict[str, Any]]:
    """``each`` prompts of every kind about what is not trained on, in words that are not trained on."""
    draw = random.Random(21)
    made = []
    for name in NAMES * each:
        topic = draw.choice(HELD_OUT)
        question = draw.choice(YES_NO if name == CHOICE else WRITING_FORMS).format(topic)
        made.append(wish(draw, question, [name], [drawn(draw, name, question)], HELD_OUT_PHRASES))
    return made
