"""Texts much like an earlier one: MinHash with exact Jaccard, cosine of TF-IDF or given vectors; clusters."""

from __future__ import annotations

import base64
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from nemotron4.errors import DataError
from nemotron4.synth.parsing import normalise
from nemotron4.synth.words import maths, tokens

SHINGLE_BYTES = 5
SHORT_CHARACTERS = 400
NUM_BANDS = 20
ROWS_PER_BAND = 5
_BATCH = 8192
_PER_GROUP = 4  # earlier members of a bucket that each later one is compared with

U64 = NDArray[np.uint64]


def find_near_duplicates(texts: Sequence[str], threshold: float) -> dict[int, int]:
    """Index of each text to drop -> index of the earlier, kept text it repeats (Jaccard >= threshold).

    Two texts of Jaccard similarity s become candidates with probability 1 - (1 - s^5)^20: 0.996 at 0.75.
    Deterministic; texts shorter than a shingle are compared as a whole.
    """
    keys = [normalise(text).encode() for text in texts]
    signatures_NK = _signatures(keys)
    pairs = _candidates(signatures_NK)
    dropped: dict[int, int] = {}
    shingles: dict[int, frozenset[bytes]] = {}
    for later, earlier in sorted(pairs):
        if later in dropped or earlier in dropped:
            continue
        if differ_in_maths(texts[later], texts[earlier]):
            continue
        if _jaccard(_shingles(keys, later, shingles), _shingles(keys, earlier, shingles)) >= threshold:
            dropped[later] = earlier
        if len(shingles) > 100_000:
            shingles.clear()
    return dropped


def differ_in_maths(first: str, second: str) -> bool:
    """Short questions with other numbers or signs are two questions; long texts may differ in a date."""
    return min(len(first), len(second)) < SHORT_CHARACTERS and maths(first) != maths(second)


def _signatures(keys: Sequence[bytes]) -> NDArray[np.uint32]:
    """MinHash values, one row per text; multiply-shift hashes of the shingles."""
    draw = np.random.default_rng(340)
    num_hashes = NUM_BANDS * ROWS_PER_BAND
    factors = draw.integers(1, 2**63, num_hashes, dtype=np.uint64) | np.uint64(1)
    offsets = draw.integers(0, 2**63, num_hashes, dtype=np.uint64)
    signatures = np.empty((len(keys), num_hashes), np.uint32)
    for start in range(0, len(keys), _BATCH):
        batch = keys[start : start + _BATCH]
        hashes, starts = _shingle_hashes(batch)
        for k in range(num_hashes):
            mixed = (hashes * factors[k] + offsets[k]) >> np.uint64(32)
            signatures[start : start + len(batch), k] = np.minimum.reduceat(mixed.astype(np.uint32), starts)
    return signatures


def _shingle_hashes(batch: Sequence[bytes]) -> tuple[U64, NDArray[np.intp]]:
    """Hashes of all shingles of a batch, one text after the other, and where each text begins."""
    padded = [key if len(key) >= SHINGLE_BYTES else key.ljust(SHINGLE_BYTES, b"\0") for key in batch]
    data = np.frombuffer(b"".join(padded), np.uint8).astype(np.uint64)
    lengths = np.array([len(key) for key in padded])
    windows = np.zeros(len(data) - SHINGLE_BYTES + 1, np.uint64)
    for i in range(SHINGLE_BYTES):
        windows = (windows << np.uint64(8)) | data[i : i + len(windows)]
    ends = np.cumsum(lengths)
    is_inside = np.ones(len(data), bool)
    for i in range(1, SHINGLE_BYTES):
        is_inside[ends - i] = False  # windows that would reach into the next text
    counts = lengths - SHINGLE_BYTES + 1
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    inside = windows[is_inside[: len(windows)]]
    # Spread the five bytes over the word (the finaliser of SplitMix64).
    inside = (inside ^ (inside >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return inside ^ (inside >> np.uint64(27)), starts


def _candidates(signatures_NK: NDArray[np.uint32]) -> set[tuple[int, int]]:
    """(later, earlier) pairs that agree in all rows of at least one band."""
    pairs: set[tuple[int, int]] = set()
    for band in range(NUM_BANDS):
        rows = signatures_NK[:, band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND].astype(np.uint64)
        keys = np.zeros(len(rows), np.uint64)
        for column in range(ROWS_PER_BAND):
            keys = (keys ^ rows[:, column]) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(32)
        order = np.argsort(keys, kind="stable")  # equal keys stay in the order of the texts
        for distance in range(1, _PER_GROUP + 1):
            is_equal = keys[order[distance:]] == keys[order[:-distance]]
            later, earlier = order[distance:][is_equal], order[:-distance][is_equal]
            pairs.update(zip(later.tolist(), earlier.tolist(), strict=True))
        _add_first_members(keys, order, pairs)
    return pairs


def _add_first_members(keys: U64, order: NDArray[np.intp], pairs: set[tuple[int, int]]) -> None:
    """Each member of a bucket against the bucket's first: the one that is most likely kept."""
    ordered = keys[order]
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    first = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    later = order[~is_first]
    pairs.update(zip(later.tolist(), first[~is_first].tolist(), strict=True))


def _shingles(keys: Sequence[bytes], index: int, cache: dict[int, frozenset[bytes]]) -> frozenset[bytes]:
    if index not in cache:
        key = keys[index]
        last = max(1, len(key) - SHINGLE_BYTES + 1)
        cache[index] = frozenset(key[i : i + SHINGLE_BYTES] for i in range(last))
    return cache[index]


def _jaccard(first: frozenset[bytes], second: frozenset[bytes]) -> float:
    common = len(first & second)
    return common / (len(first) + len(second) - common)


Vector = dict[str, float]


def find_similar_words(texts: Sequence[str], threshold: float) -> dict[int, tuple[int, float]]:
    """later text -> (kept earlier text, cosine); the first of similar texts stays. threshold: 0 to 1."""
    counted = [Counter(tokens(text)) for text in texts]
    frequency = Counter(word for counts in counted for word in counts)
    vectors = [_vector(counts, frequency, len(texts)) for counts in counted]
    holders: defaultdict[str, list[int]] = defaultdict(list)
    found: dict[int, tuple[int, float]] = {}
    for index, vector in enumerate(vectors):
        rare = _must_share_one(vector, frequency, threshold)
        candidates = sorted({other for word in rare for other in holders[word]})
        scores = [
            (_dot(vector, vectors[other]), -other)
            for other in candidates
            if not differ_in_maths(texts[index], texts[other])
        ]
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


F32 = NDArray[np.float32]
_BLOCK = 2048
_ROUNDS = 25  # of k-means; by then few texts change their cluster


def pack_vector(vector: Sequence[float]) -> str:
    """Of unit length, so that a product of two is their cosine."""
    values = np.asarray(vector, np.float32)
    norm = float(np.linalg.norm(values))
    return base64.b64encode((values / norm if norm else values).tobytes()).decode("ascii")


def unpack_vectors(packed: Sequence[bytes]) -> F32:
    """One row per text; all of one length."""
    lengths = {len(vector) for vector in packed}
    if len(lengths) > 1:
        raise DataError(
            f"vectors of {len(lengths)} lengths: {sorted(length // 4 for length in lengths)}",
            hint="they are of several models; let one `embed` stage make all of them",
        )
    return np.frombuffer(b"".join(packed), np.float32).reshape(len(packed), -1)


def find_alike(
    vectors_ND: F32, threshold: float, differ: Callable[[int, int], bool] = lambda later, kept: False
) -> dict[int, tuple[int, float]]:
    """later text -> (kept earlier text, cosine); every pair is looked at, a block of products at a time.

    ``differ`` says of two texts that they are not the same, whatever their vectors say.
    """
    found: dict[int, tuple[int, float]] = {}
    kept: list[int] = []
    for start in range(0, len(vectors_ND), _BLOCK):
        block = vectors_ND[start : start + _BLOCK]
        earlier = vectors_ND[kept] @ block.T if kept else np.zeros((0, len(block)), np.float32)
        inside = block @ block.T
        new: list[int] = []
        for column in range(len(block)):
            scores = np.concatenate([earlier[:, column], inside[new, column]])
            above = np.flatnonzero(scores >= threshold)
            for at in above[np.argsort(-scores[above], kind="stable")]:
                other = kept[at] if at < len(kept) else start + new[at - len(kept)]
                if not differ(start + column, other):
                    found[start + column] = (other, float(scores[at]))
                    break
            else:
                new.append(column)
        kept += [start + column for column in new]
    return found


def cluster(vectors_ND: F32, num_clusters: int, seed: int = 0) -> tuple[NDArray[np.intp], F32]:
    """(cluster, cosine with its centre) of each text, by spherical k-means from drawn texts."""
    draw = np.random.default_rng(seed)
    num = min(num_clusters, len(vectors_ND))
    centres_KD = vectors_ND[np.sort(draw.choice(len(vectors_ND), num, replace=False))].copy()
    labels_N = np.full(len(vectors_ND), -1)
    for _ in range(_ROUNDS):
        new_N = np.concatenate(
            [(vectors_ND[i : i + _BLOCK] @ centres_KD.T).argmax(1) for i in range(0, len(vectors_ND), _BLOCK)]
        )
        if (new_N == labels_N).all():
            break
        labels_N = new_N
        for k in range(num):
            members = vectors_ND[labels_N == k]
            if len(members):
                mean = members.mean(0)
                centres_KD[k] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return labels_N, np.einsum("nd,nd->n", vectors_ND, centres_KD[labels_N])
