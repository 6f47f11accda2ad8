"""Texts of nearly the same words are found exactly, and the first one stays."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from nemotron4.synth.duplicates import find_similar_words


def test_a_sentence_turned_around_is_found() -> None:
    texts = [
        "Why do rivers carry so much sand to the sea in spring?",
        "How is bread made without yeast?",
        "In spring, why do rivers carry so much sand to the sea?",
    ]
    found = find_similar_words(texts, 0.9)
    assert set(found) == {2}
    assert found[2] == (0, pytest.approx(1.0))


def naive(texts: list[str], threshold: float) -> dict[int, int]:
    """Every pair compared; the formula written out once more."""
    counted = [Counter(text.split()) for text in texts]
    frequency = Counter(word for counts in counted for word in counts)

    def weight(index: int, word: str) -> float:
        return (1 + math.log(counted[index][word])) * (1 + math.log(len(texts) / frequency[word]))

    def cosine(a: int, b: int) -> float:
        dot = sum(weight(a, word) * weight(b, word) for word in counted[a].keys() & counted[b].keys())
        norms = [math.sqrt(sum(weight(i, word) ** 2 for word in counted[i])) for i in (a, b)]
        return dot / (norms[0] * norms[1])

    kept: list[int] = []
    dropped: dict[int, int] = {}
    for index in range(len(texts)):
        rivals = [(cosine(index, other), -other) for other in kept]
        best, other = max(rivals, default=(0.0, 0))
        if best >= threshold:
            dropped[index] = -other
        else:
            kept.append(index)
    return dropped


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_no_pair_is_missed(threshold: float) -> None:
    draw = random.Random(3)
    words = [f"w{i}" for i in range(30)]
    texts = [" ".join(draw.choices(words, k=draw.randint(2, 9))) for _ in range(150)]
    found = find_similar_words(texts, threshold)
    assert {later: kept for later, (kept, _) in found.items()} == naive(texts, threshold)
    assert found


def test_texts_without_words_are_left_alone() -> None:
    assert find_similar_words(["", "?!", "", "word"], 0.9) == {}
