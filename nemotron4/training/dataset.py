"""Which sample stands at which position of a run: a pure function, so resuming needs only a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nemotron4.training.packing import Sample


@dataclass
class Dataset:
    """Samples in memory, visited in a fresh order each epoch, or in a weighted mixture of sources.

    With ``source_sizes`` and ``weights`` (pre-training) the source of each position is drawn by weight and
    each source is walked through in its own shuffled order, as often as it takes.
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
