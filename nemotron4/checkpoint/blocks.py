"""Tensors in blocks of rows, so that a conversion holds a few megabytes whatever the model's size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from nemotron4.checkpoint.interface import Checkpoint

BLOCK_VALUES = 2 * 1024**2  # small enough that the allocator reuses the memory of the last block


def row_ranges(start: int, stop: int, columns: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """``start:stop`` cut into ranges of at most BLOCK_VALUES values (at least one row)."""
    step = max(1, BLOCK_VALUES // max(1, math.prod(columns)))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def blocks(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
    """The whole tensor, block after block."""
    shape = checkpoint.tensors[name].shape
    for start, stop in row_ranges(0, shape[0], shape[1:]):
        yield checkpoint.read_rows(name, start, stop, dtype)
