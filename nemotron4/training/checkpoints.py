"""Checkpoints of a run: whole or absent, never pickled, readable under another layout.

A checkpoint is a folder ``step-00000120`` with safetensors shards and ``state.json``. It is written under a
hidden name, synchronised to disk and renamed, so a folder that has its name is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from nemotron4.errors import CheckpointError

STATE_FILE = "state.json"


@dataclass(frozen=True)
class SavedState:
    """Everything but tensors that a resumed run needs."""

    step: int  # steps done
    samples_seen: int
    fingerprint: str  # of data, model and settings that must not change within a run
    best_validation: float | None = None
    best_step: int | None = None


def save(folder: Path, tensors: Mapping[str, Tensor], state: SavedState) -> Path:
    """Write a checkpoint for ``state.step``; every process calls it. Returns its final path."""
    final = folder / f"step-{state.step:08d}"
    partial = folder / f".partial-step-{state.step:08d}"
    is_first = _rank() == 0
    try:
        if is_first:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        _barrier()
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        with _quiet():
            save_tensors(dict(tensors), storage_writer=writer, no_dist=not _is_distributed())
        _barrier()
        if is_first:
            (partial / STATE_FILE).write_text(json.dumps(state.__dict__), encoding="utf-8")
            _synchronise(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _synchronise_entry(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else str(error)
        raise CheckpointError(
            f"{final}: the checkpoint could not be written: {reason}",
            hint="the previous checkpoint is intact; free some space and repeat the command",
        ) from error
    _barrier()
    return final


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    complete = sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())
    return complete[-1] if complete else None


def read_state(path: Path) -> SavedState:
    try:
        values: dict[str, Any] = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        return SavedState(**values)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / STATE_FILE}: cannot be read: {error}") from error


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill the given tensors (plain or sharded, of any layout) in place."""
    with _quiet():
        load_tensors(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(path)),
            no_dist=not _is_distributed(),
        )


def prune(folder: Path, keep: int, best_step: int | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the best one, and what interrupted saves left."""
    if _rank() != 0:
        return
    best = None if best_step is None else f"step-{best_step:08d}"
    for path in sorted(folder.glob("step-*"))[:-keep]:
        if path.name != best:
            shutil.rmtree(path)
    for path in folder.glob(".partial-step-*"):
        shutil.rmtree(path)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


def _barrier() -> None:
    if _is_distributed():
        dist.barrier()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _synchronise(folder: Path) -> None:
    for path in folder.iterdir():
        _synchronise_entry(path)
    _synchronise_entry(folder)


def _synchronise_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def plain_tensors(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Parameters and their AdamW moments under flat names, the same under every layout.

    Asking for the moments of a parameter that has not been stepped yet creates them, as zeros.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"model.{name}"] = parameter.detach()
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            tensors[f"optimizer.{key}.{name}"] = state[key]
    return tensors
