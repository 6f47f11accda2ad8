"""Tensors in blocks of rows, so that a conversion holds a few megabytes whatever the model's size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat

BLOCK_VALUES = 2 * 1024**2  # small enough that the allocator reuses the memory of the last block


@runtime_checkable
class RowReader(Protocol):
    """A checkpoint that can read some rows of a tensor without the rest."""

    def read_rows(
        self, name: str, start: int, stop: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor: ...


def row_ranges(start: int, stop: int, columns: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """``start:stop`` cut into ranges of at most BLOCK_VALUES values (at least one row)."""
    step = max(1, BLOCK_VALUES // max(1, math.prod(columns)))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def read_rows(
    checkpoint: Checkpoint, name: str, start: int, stop: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Rows ``start:stop`` of a tensor."""
    if isinstance(checkpoint, RowReader):
        return checkpoint.read_rows(name, start, stop, dtype)
    rows = checkpoint.read(name)[start:stop]
    return rows if dtype is None else rows.to(dtype)


def blocks(checkpoint: Checkpoint, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
    """The whole tensor, block after block."""
    shape = checkpoint.tensors[name].shape
    for start, stop in row_ranges(0, shape[0], shape[1:]):
        yield read_rows(checkpoint, name, start, stop, dtype)


def cached_rows(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself if it reads rows, else a view that keeps the tensor it read last."""
    return checkpoint if isinstance(checkpoint, RowReader) else _LastTensor(checkpoint)


class _LastTensor:
    """A checkpoint whose ``read`` keeps one tensor, so that reading it block by block reads it once."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._last: tuple[str, torch.Tensor] | None = None
        self.path, self.format, self.name = checkpoint.path, checkpoint.format, checkpoint.name
        self.config, self.tensors, self.notes = checkpoint.config, checkpoint.tensors, checkpoint.notes
        self.bos_token_id, self.adds_bos = checkpoint.bos_token_id, checkpoint.adds_bos
        self.eos_token_ids = checkpoint.eos_token_ids

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # frees the old tensor before the new one is read
            self._last = (name, self._checkpoint.read(name))
        tensor = self._last[1]
        return tensor if dtype is None else tensor.to(dtype)

    def tokenizer(self) -> Tokenizer:
        return self._checkpoint.tokenizer()

    def prompt_format(self) -> PromptFormat | None:
        return self._checkpoint.prompt_format()
