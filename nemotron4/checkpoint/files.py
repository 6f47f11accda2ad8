"""Reading files of a checkpoint, with errors that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from nemotron4.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_bytes(path: Path, tensor_name: str, offset: int, num_bytes: int) -> torch.Tensor:
    """The stored bytes of one tensor, as uint8 in memory of their own.

    A plain read, no mapping: a mapped file that shrinks later kills the process, and its pages count as
    resident memory.
    """
    data = torch.empty(num_bytes, dtype=torch.uint8)
    buffer, done = memoryview(data.numpy().data), 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            # One system call reads 2 GiB at most, hence the loop.
            while done < num_bytes and (count := file.readinto(buffer[done:])):
                done += count
    except OSError as error:
        raise CheckpointError(f"{path}: tensor {tensor_name!r}: {error.strerror}") from error
    if done < num_bytes:
        raise CheckpointError(
            f"{path}: tensor {tensor_name!r} is cut off: {done} of {num_bytes} bytes",
            hint="the file is truncated: fetch it again",
        )
    return data
