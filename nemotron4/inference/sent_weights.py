"""A trainer's tensors in files, for engines whose processes read them there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.errors import CheckpointError


def source_of(checkpoint: Checkpoint, adapter: str | Path | None) -> dict[str, str | None]:
    """Where the processes of an engine find a checkpoint, and the adapter to merge into it."""
    merged = None if adapter is None else str(Path(adapter).resolve())
    return {"model": str(checkpoint.path.resolve()), "adapter": merged}


class SentWeights:
    """Of a checkpoint and the adapter merged into it. Of several files with a tensor the last one counts."""

    def __init__(self, checkpoint: Checkpoint, adapter: str | Path | None, folder: Path) -> None:
        self.source = source_of(checkpoint, adapter)
        self._names, self._folder = set(checkpoint.tensors), folder
        self._files: dict[Path, set[str]] = {}  # with the names for which each is the last
        self._num_kept = 0

    @property
    def files(self) -> list[str]:
        return list(map(str, self._files))

    def keep(self, changed: Mapping[str, torch.Tensor]) -> None:
        """Write a file of these tensors, and drop those that are needed no more."""
        if unknown := sorted(changed.keys() - self._names):
            raise CheckpointError(f"{self.source['model']}: has no tensor {unknown[0]!r}")
        path = self._folder / f"sent-{self._num_kept}.safetensors"
        self._num_kept += 1
        try:
            save_file({name: tensor.contiguous() for name, tensor in changed.items()}, path)
        except (OSError, SafetensorError) as error:  # a full disk, as the library says it
            path.unlink(missing_ok=True)
            raise CheckpointError(
                f"{path}: the sent weights cannot be written: {error}",
                hint="vLLM reads them there; TMPDIR names another folder for the server",
            ) from error
        for earlier, names in list(self._files.items()):
            names.difference_update(changed)
            if not names:
                del self._files[earlier]
                earlier.unlink()
        self._files[path] = set(changed)
