"""Checkpoints of a run: whole or absent, never pickled, readable under another layout.

A checkpoint is a folder ``step-00000120`` with safetensors shards and ``state.json``. Each process writes its
own shard, behind the training, under a hidden name; when all are on disk the folder is renamed. So a folder
that has its name is complete. torch's distributed checkpoint plans and reads the shards; its safetensors
storage is used because its own storage keeps a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from nemotron4.checkpoint.trained import STATE_FILE, WEIGHTS
from nemotron4.errors import CheckpointError
from nemotron4.runs import flush, publish
from nemotron4.training.optimizer import moments

Given = TypeVar("Given")
FILES_PER_PROCESS = 8  # a file is serialised in memory before it is written


@dataclass(frozen=True)
class SavedState:
    """Everything but tensors that a resumed run needs."""

    step: int  # steps done
    samples_seen: int
    fingerprint: str  # of data, model and settings that must not change within a run
    best_validation: float | None = None
    best_step: int | None = None
    num_stale: int = 0  # validations since the best one
    metric: str = ""  # run.metric, of which the best is one
    owes_validation: bool = False  # the run was stopped while it validated this step


class Writer:
    """Writes the checkpoints of a run while it trains on; every process has one and makes the same calls.

    At most one checkpoint is being written: ``save`` waits for the one before, then copies the tensors to
    main memory and returns. An error of one process is an error of all: it is raised by the next ``save`` or
    by ``wait``, and the newest complete checkpoint is untouched.
    """

    def __init__(self, folder: Path, *, keep: int, kept_step: int | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.kept_step = kept_step
        # A group of its own: its collectives run next to the training's, in another thread.
        self._group = dist.new_group(backend="gloo") if _is_distributed() else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, tensors: Mapping[str, Tensor], state: SavedState) -> None:
        """Begin the checkpoint of ``state.step``; once whole, all but the newest ``keep`` and the best go."""
        self.wait()
        copies = _copied(tensors)
        self._pending = self._thread.submit(self._write, copies, state)

    def has_failed(self) -> bool:
        """True when the checkpoint begun last is known to have failed on this process."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Until the checkpoint begun last is complete; CheckpointError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, tensors: dict[str, Tensor], state: SavedState) -> None:
        final = step_folder(self.folder, state.step)
        partial = self.folder / f".partial-step-{state.step:08d}"
        names = sorted({name for part in self._gathered(list(tensors)) for name in part})
        files = {name: 1 + place % FILES_PER_PROCESS for place, name in enumerate(names)}
        writer = HuggingFaceStorageWriter(str(partial), fqn_to_index_mapping=files, save_distributed=True)

        def begin() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()

        def write_shard() -> None:
            with _quiet():
                save_tensors(
                    tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None
                )
            for path in partial.glob(f"shard-{_rank() + 1:05d}-*"):
                flush(path)

        def complete() -> None:
            (partial / STATE_FILE).write_text(json.dumps(state.__dict__), encoding="utf-8")
            shutil.rmtree(final, ignore_errors=True)
            publish(partial, final)
            prune(self.folder, self.keep, state.best_step, self.kept_step)

        is_first = _rank() == 0
        for part in (begin if is_first else None, write_shard, complete if is_first else None):
            reason = self._first_reason(part)
            if reason is not None:
                if is_first:
                    shutil.rmtree(partial, ignore_errors=True)
                raise CheckpointError(
                    f"{final}: the checkpoint could not be written: {reason}",
                    hint="the previous checkpoint is intact; free some space and repeat the command",
                )

    def _first_reason(self, part: Callable[[], None] | None) -> str | None:
        """Do this process's part; why the first process that failed did, on every process."""
        reason = None
        try:
            if part is not None:
                part()
        except OSError as error:
            reason = _reason(error)
        except CheckpointException as error:
            causes = [failure for failure, _ in error.failures.values()]
            if not all(isinstance(cause, OSError) for cause in causes):
                raise
            reason = _reason(causes[0])
        return next((text for text in self._gathered(reason) if text is not None), None)

    def _gathered(self, value: Given) -> list[Given]:
        """The values of all processes."""
        if self._group is None:
            return [value]
        values = [value] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def _reason(error: BaseException) -> str:
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "no space left on the disk" if is_full else str(error)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in main memory, in memory of their own, sharded as they were."""
    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    stager = DefaultStager(options)
    copies = stager.stage(dict(tensors))
    stager.close()
    assert isinstance(copies, dict), "the options ask for a copy at once"
    return copies


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


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def prune(folder: Path, keep: int, *kept_steps: int | None) -> None:
    """Delete all but the newest ``keep`` checkpoints and the given ones, and what interrupted saves left."""
    kept = {step_folder(folder, step) for step in kept_steps if step is not None}
    for path in sorted(folder.glob("step-*"))[:-keep]:
        if path not in kept:
            shutil.rmtree(path)
    for path in folder.glob(".partial-step-*"):
        shutil.rmtree(path)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _is_distributed() else 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def plain_tensors(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Parameters and their AdamW moments under flat names, the same under every layout."""
    tensors = {f"{WEIGHTS}{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors.update((f"optimizer.{name}", tensor) for name, tensor in moments(parameters, optimizer))
    return tensors
