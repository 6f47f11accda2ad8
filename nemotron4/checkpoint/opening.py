"""One call for every form of checkpoint, and what shows how much of it has been read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from nemotron4.checkpoint.cache import models_among, resolve
from nemotron4.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from nemotron4.checkpoint.gguf import GgufCheckpoint
    from nemotron4.checkpoint.huggingface import HuggingFaceCheckpoint
    from nemotron4.checkpoint.interface import Checkpoint, RawTensor
    from nemotron4.checkpoint.merge_adapter import MergedCheckpoint
    from nemotron4.checkpoint.nemo import NemoCheckpoint
    from nemotron4.progress import Progress


def open_checkpoint(
    model: str | Path | Checkpoint, *, context: int | None = None, revision: str | None = None
) -> Checkpoint:
    """Open a pulled name, a directory, a ``.gguf`` or ``.nemo`` file, or a pulled hub id.

    Reads the configuration and the index, checks both, and leaves the weights on disk. A checkpoint that is
    open already is returned as it is. ``context`` shortens the model's context length; ``revision`` is the
    branch, tag or commit of a hub id.
    """
    if not isinstance(model, str | Path):
        return model
    checkpoint = _opened(model, revision)
    if context is not None:
        config = checkpoint.config
        if context > config.context_length:
            raise CheckpointError(
                f"{checkpoint.path}: context is {context}; the model has {config.context_length} positions",
                hint=f"use --context {config.context_length} or less",
            )
        checkpoint.config = replace(config, context_length=context)
    return checkpoint


def _opened(
    model: str | Path, revision: str | None
) -> HuggingFaceCheckpoint | GgufCheckpoint | NemoCheckpoint | MergedCheckpoint:
    path = resolve(str(model), revision=revision)
    name = None if path == Path(model) else str(model)
    # Imported here because ``pull`` and ``--help`` pass through this package and need no torch.
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf(path, name)
        if path.suffix == ".nemo":
            return _nemo(path, name)
        raise CheckpointError(f"{path}: not a checkpoint: expected a directory, a .gguf or a .nemo file")
    if (path / "config.json").is_file():
        from nemotron4.checkpoint.huggingface import HuggingFaceCheckpoint
        from nemotron4.checkpoint.safetensors import has_megatron_names

        if has_megatron_names(path):
            return _nemo(path, name)

        return HuggingFaceCheckpoint(path, name=name)
    if path.name.startswith("step-") and (path / "state.json").is_file():
        from nemotron4.checkpoint.trained import TrainedCheckpoint

        return TrainedCheckpoint(path)
    if (path / "model_config.yaml").is_file() or (path / "context" / "model.yaml").is_file():
        return _nemo(path, name)
    files = list(path.glob("*.gguf")) or list(path.glob("*/*.gguf"))
    models = models_among(file.relative_to(path).as_posix() for file in files)
    if len(models) > 1:
        raise CheckpointError(
            f"{path}: {len(models)} GGUF models: {', '.join(files[0] for files in models)}",
            hint="give the path of one of them",
        )
    if models:
        return _gguf(path / models[0][0], name)
    if (path / "adapter_config.json").is_file():
        return _on_its_base(path)
    if (path / ".metadata").is_file():
        raise CheckpointError(
            f"{path}: weights of a trainer without their configuration",
            hint="copy config.json and the tokenizer files of the model that was trained into this folder",
        )
    raise CheckpointError(
        f"{path}: no checkpoint: neither config.json, model_config.yaml nor a .gguf file is there"
    )


def _on_its_base(folder: Path) -> MergedCheckpoint:
    """An adapter's folder as a whole model: its base, found and checked, with the adapter in its weights."""
    from nemotron4.checkpoint.adapter_base import base_of
    from nemotron4.checkpoint.merge_adapter import MergedCheckpoint, is_mergeable

    base = base_of(folder)
    if not is_mergeable(folder):
        raise CheckpointError(
            f"{folder}: an adapter that works next to its base's weights, not in them",
            hint=f"open it as --model {base} --adapter {folder}",
        )
    return MergedCheckpoint(open_checkpoint(base), folder)


def _gguf(path: Path, name: str | None) -> GgufCheckpoint:
    from nemotron4.checkpoint.gguf import GgufCheckpoint

    return GgufCheckpoint(path, name=name)


def _nemo(path: Path, name: str | None) -> NemoCheckpoint:
    from nemotron4.checkpoint.nemo import open_nemo

    return open_nemo(path, name=name)


Value = TypeVar("Value")


@contextmanager
def watched(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """The same checkpoint; until the block ends its tensors are counted as they are read."""
    from nemotron4.progress import Progress

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
