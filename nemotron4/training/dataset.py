"""The samples of a run, and which is at which position: a pure function, so resuming needs one number."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Protocol

import numpy
import torch

from nemotron4.errors import ConfigError
from nemotron4.training.samples import Sample, SampleSequence, Segment


class EpochOrder(Protocol):
    """Which sample is at each place of an epoch."""

    def __getitem__(self, place: int, /) -> int: ...


BLOCK = 65_536


@dataclass
class Dataset:
    """Samples visited in a fresh order each epoch, or in a weighted mixture of sources.

    With ``source_sizes`` and ``weights`` each BLOCK of positions has every source in its share, in an order
    that the seed and the block's number decide, so any position is found without those before it. Each
    source is walked through in a shuffled order of its own (``orders``, or one in memory), as often as it
    takes.
    """

    samples: Sequence[Sample]
    seed: int
    source_sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    orders: Mapping[int, Callable[[int], EpochOrder]] = field(
        default_factory=dict
    )  # source -> order of an epoch
    _orders: dict[tuple[int, int], EpochOrder] = field(default_factory=dict, repr=False)
    _blocks: dict[int, tuple[numpy.ndarray, numpy.ndarray]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    def at(self, position: int) -> Sample:
        """The sample at a global position, counted over the whole run from 0."""
        source, visit, size, first = 0, position, len(self.samples), 0
        if self.weights:
            source, visit = self._drawn(position)
            size, first = self.source_sizes[source], sum(self.source_sizes[:source])
        epoch, offset = divmod(visit, size)
        return self.samples[first + self._order(source, size, epoch)[offset]]

    def _order(self, source: int, size: int, epoch: int) -> EpochOrder:
        key = (source, epoch)
        if key not in self._orders:
            for old in [k for k in self._orders if k[0] == source and k[1] < epoch - 1]:
                del self._orders[old]
            if source in self.orders:
                self._orders[key] = self.orders[source](epoch)
            else:
                self._orders[key] = epoch_order(size, seed=self.seed + 7919 * source, epoch=epoch)
        return self._orders[key]

    def _drawn(self, position: int) -> tuple[int, int]:
        """The source of a position, and how often it was visited before."""
        block, place = divmod(position, BLOCK)
        counts = block_counts(self.weights)
        if block not in self._blocks:
            self._blocks.clear()
            order = numpy.asarray(epoch_order(BLOCK, seed=self.seed, epoch=block))
            sources = numpy.repeat(numpy.arange(len(counts)), counts)[order]
            visits = numpy.empty(BLOCK, numpy.int64)
            for source, count in enumerate(counts):
                visits[sources == source] = numpy.arange(count)
            self._blocks[block] = sources, visits
        sources, visits = self._blocks[block]
        source = int(sources[place])
        return source, block * counts[source] + int(visits[place])


@cache
def block_counts(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Positions of each source in a block: rounded by the largest remainder, none with a weight left out."""
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    counts = [max(int(share), int(share > 0)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for source in by_remainder[: BLOCK - sum(counts)]:
        counts[source] += 1
    counts[counts.index(max(counts))] -= sum(counts) - BLOCK
    return tuple(counts)


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> array[int]:
    """A permutation of the samples that depends on seed and epoch only; 8 bytes for each."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return array("q", torch.randperm(num_samples, generator=generator).numpy().tobytes())


class TextWindows(SampleSequence):
    """Documents laid end to end and cut into windows; a window's pieces do not see each other.

    ``stream`` holds the documents' tokens and ``starts`` where each begins, with the stream's length behind
    them. A document starts with the separator (BOS, else EOS) and ends with EOS, so its first token and its
    end train too. One that goes on in the next window repeats one token there, so no prediction is lost.
    ``front`` is put before each piece and never trains (P-tuning).
    """

    def __init__(
        self, stream: numpy.ndarray, starts: Sequence[int], max_length: int, front: tuple[int, ...] = ()
    ) -> None:
        longest = max_length - len(front)
        if longest < 2:
            raise ConfigError(
                f"data.max_length ({max_length}) leaves no room for text behind {len(front)} virtual tokens"
            )
        pieces = [
            (at, min(at + longest, int(stop)))
            for start, stop in pairwise(starts)
            for at in range(int(start), int(stop) - 1, longest - 1)
        ]
        self._stream = stream
        self._windows = _fill(pieces, max_length, len(front))
        self._front = front

    def __len__(self) -> int:
        return len(self._windows)

    def sample(self, index: int) -> Sample:
        segments = []
        for start, stop in self._windows[index]:
            tokens = tuple(self._stream[start:stop].tolist())
            is_trained = [False] * (len(self._front) + 1) + [True] * (len(tokens) - 1)
            segments.append(Segment((*self._front, *tokens), tuple(is_trained)))
        return Sample(tuple(segments), where=f"window {index}")


class ConcatDataset(SampleSequence):
    """Several sequences of samples as one, without copying them."""

    def __init__(self, parts: Sequence[Sequence[Sample]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def sample(self, index: int) -> Sample:
        for part in self._parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def _fill(pieces: Sequence[tuple[int, int]], max_length: int, num_front: int) -> list[list[tuple[int, int]]]:
    """Pieces in order, as many to a window as fit with ``num_front`` tokens before each."""
    windows: list[list[tuple[int, int]]] = []
    used = max_length
    for start, stop in pieces:
        size = num_front + stop - start
        if used + size > max_length:
            windows.append([])
            used = 0
        windows[-1].append((start, stop))
        used += size
    return windows
