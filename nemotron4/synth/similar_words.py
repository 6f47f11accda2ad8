"""Texts that are about the same in nearly the same words, in any order: cosine of TF-IDF vectors.

Near-duplicate removal needs common runs of characters; a sentence turned around has few, but the same words.
No pair above the threshold is missed: only the rare words of a text are looked up, as many of them as a text
that is similar enough must share one of (Bayardo et al. 2007, "Scaling up all pairs similarity search").
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

_WORD = re.compile(r"\w+")
Vector = dict[str, float]


def find_similar_words(texts: Sequence[str], threshold: float) -> dict[int, tuple[int, float]]:
    """later text -> (kept earlier text, cosine); the first of similar texts stays. threshold: 0 to 1."""
    counted = [Counter(_WORD.findall(text.lower())) for text in texts]
    frequency = Counter(word for counts in counted for word in counts)
    vectors = [_vector(counts, frequency, len(texts)) for counts in counted]
    holders: defaultdict[str, list[int]] = defaultdict(list)
    found: dict[int, tuple[int, float]] = {}
    for index, vector in enumerate(vectors):
        rare = _must_share_one(vector, frequency, threshold)
        candidates = sorted({other for word in rare for other in holders[word]})
        scores = [(_dot(vector, vectors[other]), -other) for other in candidates]
        best, kept = max(scores, default=(0.0, 0))
        if best >= threshold:
            found[index] = (-kept, best)
            continue
        for word in rare:
            holders[word].append(index)
    return found


def _vector(counts: Counter[str], frequency: Counter[str], num_texts: int) -> Vector:
    """Unit length; a word in every text still counts a little."""
    weights = {
        word: (1 + math.log(number)) * (1 + math.log(num_texts / frequency[word]))
        for word, number in counts.items()
    }
    norm = math.sqrt(sum(weight * weight for weight in weights.values())) or 1.0
    return {word: weight / norm for word, weight in weights.items()}


def _must_share_one(vector: Vector, frequency: Counter[str], threshold: float) -> list[str]:
    """The rarest words, up to where the others alone cannot reach the threshold (Cauchy-Schwarz)."""
    words = sorted(vector, key=lambda word: (frequency[word], word))
    left = 1.0
    for place, word in enumerate(words):
        if left < threshold * threshold - 1e-9:
            return words[:place]
        left -= vector[word] ** 2
    return words


def _dot(first: Vector, second: Vector) -> float:
    small, large = (first, second) if len(first) < len(second) else (second, first)
    return sum(weight * large[word] for word, weight in small.items() if word in large)
