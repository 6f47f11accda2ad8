"""Preference pairs that differ in what was wished for: each answer follows its own wish, not the other's.

An SFT row shows a wish in one word of many; here the rest of the two answers is the same, and because every
edit is chosen as often as it is rejected nothing but the wish can tell which is right.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from edits import CHOICE, EDITS, READ, WEIGHTS, Kept, Wanted, chosen_names, drawn, sentences, wish

from nemotron4.grading.instructions import follows

Pair = tuple[str, str, str]  # prompt, chosen, rejected
NO_WISH = 0.15
SHARES: Mapping[str, int] = {
    name: weight for name, weight in WEIGHTS.items() if name not in (CHOICE, "keywords:letter_frequency")
}
PARTS = ("number_bullet", "number_paragraphs", "nth_paragraph", "multiple_sections", "two_responses")


def contrasts(kept: Kept, number: int, seed: int = 9) -> list[Pair]:
    """About ``number`` pairs of two wishes for one text, or of one wish for two texts about one topic."""
    draw, used, made = random.Random(seed), Counter(dict.fromkeys(SHARES, 0)), []
    topics: dict[str, list[tuple[Mapping[str, Any], str]]] = defaultdict(list)
    for task, text in kept:
        topics[task["check"]["topic"]].append((task, text))
    for _ in range(30 * number):
        if len(made) >= number or not kept:
            break
        task, answer = draw.choice(kept)
        question = task["question"]
        [name] = chosen_names(draw, used, SHARES, (1, 0, 0))
        if name in READ:
            other = draw.choice(topics[task["check"]["topic"]])[1]
            found = _two_texts(draw, name, question, (answer, other))
        else:
            second = draw.choices(list(SHARES), [*SHARES.values()])[0]
            names = [name, "" if second in READ or draw.random() < NO_WISH else second]
            found = _two_wishes(draw, names, question, answer)
            used.update([each for each in names if each] if found else [])
        used.update([name] if found and name in READ else [])
        made += found
    return made


def _start(draw: random.Random, text: str, most: int) -> str:
    parts = sentences(next((part for part in text.split("\n\n") if len(part.split()) > 7), text))
    return " ".join(parts[: draw.randint(1, most)])


def _is(text: str, name: str, wanted: Wanted) -> bool:
    return all(follows(text, [name], [wanted]))


def _two_wishes(draw: random.Random, names: Sequence[str], question: str, answer: str) -> list[Pair]:
    in_parts = any(part in name for name in names for part in PARTS)
    text = " ".join(sentences(answer)[: draw.randint(2, 5)]) if in_parts else _start(draw, answer, 2)
    wanted = [drawn(draw, name, question) if name else {} for name in names]
    texts = [EDITS[name](text, each) if name else text for name, each in zip(names, wanted, strict=True)]
    asked = [
        wish(draw, question, [name], [each])["question"] if name else question
        for name, each in zip(names, wanted, strict=True)
    ]
    made = []
    for own, other in ((0, 1), (1, 0)):
        name, each = names[own], wanted[own]
        if not text or (name and (not _is(texts[own], name, each) or _is(texts[other], name, each))):
            return []
        made.append((asked[own], texts[own], texts[other]))
    return made


def _two_texts(draw: random.Random, name: str, question: str, answers: Sequence[str]) -> list[Pair]:
    most = (3, 7) if name.startswith("length") else (3, 3)
    texts = [_start(draw, answer, number) for answer, number in zip(answers, most, strict=True)]
    made = []
    for own, other in ((0, 1), (1, 0)):
        wanted = READ[name](draw, texts[own])
        if wanted is None or not _is(texts[own], name, wanted) or _is(texts[other], name, wanted):
            return []
        made.append((wish(draw, question, [name], [wanted])["question"], texts[own], texts[other]))
    return made
