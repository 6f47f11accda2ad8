"""Reasons to leave a text out: length, repetition, refusal, language, likeness to a pool, contamination.

Each function answers with a reason or None; nothing here knows the ledger.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from nemotron4.synth.files import data_rows
from nemotron4.synth.words import count_words, tokens


def repetition(text: str) -> str | None:
    """Text that runs in circles: repeated lines, or one run of words that covers much of it (Gopher's rules).

    Limits of Rae et al. 2021, table A1: duplicate lines 0.30, top 2-, 3-, 4-gram 0.20, 0.18, 0.16 of the
    characters; texts under 20 words are not judged.
    """
    words = tokens(text) if count_words(text) > len(text.split()) else text.lower().split()
    if len(words) < 20:
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    repeated = len(lines) - len(set(lines))
    if len(lines) >= 4 and repeated / len(lines) > 0.3:
        return f"{repeated} of {len(lines)} lines repeat another"
    num_characters = sum(map(len, words))
    for n, limit in ((2, 0.20), (3, 0.18), (4, 0.16)):
        grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        gram, count = max(grams.items(), key=lambda entry: entry[1] * sum(map(len, entry[0])))
        share = count * sum(map(len, gram)) / num_characters
        if count > 2 and share > limit:
            return f"{' '.join(gram)!r} makes up {share:.0%} of the text"
    return None


def rouge_l(first: Sequence[str], second: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of two token lists (Lin 2004), by bit vectors."""
    if not first or not second:
        return 0.0
    positions: dict[str, int] = defaultdict(int)
    for i, token in enumerate(first):
        positions[token] |= 1 << i
    row, full = 0, (1 << len(first)) - 1
    for token in second:
        x = row | positions.get(token, 0)
        row = x & ~(x - ((row << 1) | 1)) & full
    common = row.bit_count()
    precision, recall = common / len(second), common / len(first)
    return 0.0 if common == 0 else 2 * precision * recall / (precision + recall)


def find_similar(texts: Sequence[str], threshold: float) -> dict[int, tuple[int, float]]:
    """Index of each text to drop -> (kept earlier text, ROUGE-L): the diversity rule of Self-Instruct.

    Compares with every kept text whose word counts allow the threshold: quadratic, meant for up to some ten
    thousand texts.
    """
    dropped: dict[int, tuple[int, float]] = {}
    kept: list[tuple[int, list[str], Counter[str]]] = []
    for i, text in enumerate(texts):
        own = tokens(text)
        counts = Counter(own)
        for j, other, other_counts in kept:
            total = len(own) + len(other)
            if not total or 2 * min(len(own), len(other)) / total < threshold:
                continue
            if 2 * (counts & other_counts).total() / total < threshold:
                continue
            score = rouge_l(own, other)
            if score >= threshold:
                dropped[i] = (j, score)
                break
        else:
            kept.append((i, own, counts))
    return dropped


class BenchmarkIndex:
    """Word n-grams of benchmark files, to find a prompt or answer that would give a benchmark away."""

    LONG = 13  # one shared run of 13 words is a hit
    SHORT = 10  # a shared run of 10 words is a hit if half of the benchmark item is shared

    def __init__(self) -> None:
        self._items: list[tuple[str, list[str]]] = []
        self._grams: dict[tuple[str, ...], int] = {}
        self._whole: dict[int, dict[tuple[str, ...], int]] = defaultdict(dict)

    def add(self, name: str, text: str) -> None:
        """One text of a benchmark item; under four words it says too little to be found."""
        words = tokens(text)
        if len(words) < 4:
            return
        index = len(self._items)
        self._items.append((name, words))
        if len(words) < self.SHORT:
            self._whole[len(words)].setdefault(tuple(words), index)
            return
        for i in range(len(words) - self.SHORT + 1):
            self._grams.setdefault(tuple(words[i : i + self.SHORT]), index)

    def find(self, text: str) -> tuple[str, str] | None:
        """(item, rule) of the first benchmark item that the text contains, or None."""
        words = tokens(text)
        hits: dict[int, int] = {}
        for i in range(len(words) - self.SHORT + 1):
            item = self._grams.get(tuple(words[i : i + self.SHORT]))
            if item is not None:
                hits.setdefault(item, i)
        for item in hits:
            name, others = self._items[item]
            matcher = SequenceMatcher(None, words, others, autojunk=False)
            longest = matcher.find_longest_match().size
            if longest >= self.LONG:
                return name, f"{longest} words in a row"
            overlap = sum(block.size for block in matcher.get_matching_blocks()) / len(others)
            if overlap > 0.5:
                return name, f"{longest} words in a row and {overlap:.0%} of the item"
        for length, whole in self._whole.items():
            for i in range(len(words) - length + 1):
                item = whole.get(tuple(words[i : i + length]))
                # A short item inside a much longer text is a coincidence, not a copy.
                if item is not None and length >= 0.5 * len(words):
                    return self._items[item][0], "the whole item"
        return None


def load_benchmarks(files: Sequence[Path]) -> BenchmarkIndex:
    """An index over every text in data files; an item is named ``file:line``."""
    index = BenchmarkIndex()
    for file in files:
        for where, row in data_rows(file):
            for text in _texts(row):
                index.add(where.removeprefix(f"{file.parent}/"), text)
    return index


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
