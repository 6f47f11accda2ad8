"""A checkpoint that says how much of it has been read, for the person who waits for a model to load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nemotron4.checkpoint.interface import Checkpoint, RawTensor
from nemotron4.progress import Progress

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")


@contextmanager
def watched(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The same checkpoint; until the block ends its tensors are counted as they are read."""
    total = sum(tensor.num_bytes for tensor in checkpoint.tensors.values())
    with Progress(total, name=f"loading {checkpoint.name}", unit="bytes", is_kept=False) as progress:
        yield cast("Checkpoint", _Watched(checkpoint, progress))


class _Watched:
    """Counts a tensor when it is first asked for; everything else is the checkpoint's own."""

    def __init__(self, checkpoint: Checkpoint, progress: Progress) -> None:
        self._checkpoint = checkpoint
        self._progress = progress
        self._seen: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._counted(name, self._checkpoint.read(name, dtype))

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._counted(name, self._checkpoint.read_rows(name, start, stop, dtype))

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor | None:
        raw = self._checkpoint.raw_tensor(name, start, stop)
        return raw if stop == 0 else self._counted(name, raw)  # no row: only its kind is asked for

    def _counted(self, name: str, value: Value) -> Value:
        if value is not None and name not in self._seen:
            self._seen.add(name)
            self._progress.add(self._checkpoint.tensors[name].num_bytes)
        return value
