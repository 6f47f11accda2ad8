"""The samples of a run, and which is at which position: a pure function, so resuming needs one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import overload

import numpy
import torch

from nemotron4.errors import ConfigError
from nemotron4.training.packing import Sample, Segment


@dataclass
class Dataset:
    """Samples in memory, visited in a fresh order each epoch, or in a weighted mixture of sources.

    With ``source_sizes`` and ``weights`` the source of each position is drawn by weight, and each source is
    walked through in its own shuffled order, as often as it takes.
    """

    samples: Sequence[Sample]
    seed: int
    source_sizes: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    _orders: dict[tuple[int, int], list[int]] = field(default_factory=dict, repr=False)
    _drawn: list[int] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    def at(self, position: int) -> Sample:
        """The sample at a global position, counted over the whole run from 0."""
        if self.weights:
            return self.samples[self._mixed(position)]
        epoch, offset = divmod(position, len(self.samples))
        return self.samples[self._order(0, len(self.samples), epoch)[offset]]

    def _order(self, source: int, size: int, epoch: int) -> list[int]:
        key = (source, epoch)
        if key not in self._orders:
            for old in [k for k in self._orders if k[0] == source and k[1] < epoch - 1]:
                del self._orders[old]
            self._orders[key] = epoch_order(size, seed=self.seed + 7919 * source, epoch=epoch)
        return self._orders[key]

    def _mixed(self, position: int) -> int:
        if position >= len(self._drawn):
            # Drawn from the start each time it grows: a longer list has the shorter one as its beginning.
            num = max(4096, 2 * (position + 1))
            generator = torch.Generator().manual_seed(self.seed)
            share = torch.rand(num, generator=generator, dtype=torch.float64)
            edges = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)
            self._drawn = torch.searchsorted(edges / edges[-1], share, right=True).tolist()
            self._visits = _visit_numbers(self._drawn)
        source = self._drawn[position]
        size = self.source_sizes[source]
        epoch, offset = divmod(self._visits[position], size)
        return sum(self.source_sizes[:source]) + self._order(source, size, epoch)[offset]


def _visit_numbers(sources: Sequence[int]) -> list[int]:
    """How often each position's source was visited before."""
    seen: dict[int, int] = {}
    numbers = []
    for source in sources:
        numbers.append(seen.get(source, 0))
        seen[source] = numbers[-1] + 1
    return numbers


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of the samples that depends on seed and epoch only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(num_samples, generator=generator).tolist()
    return order


class TextWindows(Sequence[Sample]):
    """Documents laid end to end and cut into windows; a window's pieces do not see each other.

    ``stream`` holds the documents' tokens and ``starts`` where each begins, with the stream's length behind
    them. A document starts and ends with the separator (BOS or EOS), so its first token and its end train
    too. One that goes on in the next window repeats one token there, so no prediction is lost. ``front`` is
    put before each piece and never trains (P-tuning).
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

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        segments = []
        for start, stop in self._windows[index]:
            tokens = tuple(self._stream[start:stop].tolist())
            is_trained = [False] * (len(self._front) + 1) + [True] * (len(tokens) - 1)
            segments.append(Segment((*self._front, *tokens), tuple(is_trained)))
        return Sample(tuple(segments), where=f"window {index}")


class ConcatDataset(Sequence[Sample]):
    """Several sequences of samples as one, without copying them."""

    def __init__(self, parts: Sequence[Sequence[Sample]]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
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
