"""The safetensors container: header and single tensors, by plain reads.

Read here and not through the ``safetensors`` package for two reasons: a cut-off file must be reported with
the tensor it hurts, and a mapped file that shrinks later would kill the process.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemotron4.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LFS_MARK = "version https://git-lfs.github.com/spec/"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# The format's word -> torch's name of the type, and its bytes.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
WORD_OF_DTYPE = {name: word for word, (name, _) in DTYPES.items()}


def lfs_pointer(path: Path) -> CheckpointError:
    """What ``git clone`` leaves in place of a large file when Git LFS is not installed."""
    return CheckpointError(
        f"{path}: a Git LFS pointer of {path.stat().st_size} bytes, not the file itself",
        hint=f"run `git lfs pull` in {path.parent}, or fetch the model with: nemotron4 pull ORG/NAME",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(LFS_MARK):
            raise lfs_pointer(path)
        values = json.loads(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_bytes(path: Path, tensor_name: str, offset: int, num_bytes: int) -> np.ndarray[Any, np.dtype[Any]]:
    """The stored bytes of one tensor, as uint8 in memory of their own.

    A plain read, no mapping: a mapped file that shrinks later kills the process, and its pages count as
    resident memory.
    """
    data = np.empty(num_bytes, dtype=np.uint8)
    buffer, done = memoryview(data.data), 0
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


@dataclass(frozen=True)
class StoredTensor:
    name: str
    word: str  # of its type, a key of DTYPES
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        import torch  # here, because an engine that computes natively needs no torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.word][0])
        return dtype


def read_header(path: Path) -> Mapping[str, StoredTensor]:
    """Every tensor of the file, checked to lie inside it. No weight is read."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(LFS_MARK))
            if start == LFS_MARK.encode():
                raise lfs_pointer(path)
            header_bytes = int.from_bytes(start[:8], "little")
            file.seek(8)
            if file_bytes < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path}: not a safetensors file: header of {header_bytes} bytes, file of {file_bytes}",
                    hint="the file is truncated or damaged: fetch it again",
                )
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    tensors = {name: _stored_tensor(path, name, entry, data_start) for name, entry in header.items()}
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != position:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} overlaps another or leaves a hole before it"
            )
        position += tensor.num_bytes
        if position > file_bytes:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} is cut off: it ends at {position}, the file at {file_bytes}",
                hint="the file is truncated: fetch it again",
            )
    if position != file_bytes:
        raise CheckpointError(f"{path}: {file_bytes - position} bytes after the last tensor")
    return tensors


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        word, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        start, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: tensor {name!r}: malformed header entry {str(entry)[:200]}"
        ) from error
    if word not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name!r} has type {word}; readable: {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[word][1]
    if min((*shape, start)) < 0 or end - start != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r}: {end - start} bytes stored; {word} {list(shape)} needs {expected}"
        )
    return StoredTensor(name, word, shape, data_start + start, expected)


def read_tensor(path: Path, tensor: StoredTensor) -> torch.Tensor:
    """The tensor as stored, in memory of its own."""
    import torch

    data = torch.from_numpy(read_bytes(path, tensor.name, tensor.offset, tensor.num_bytes))
    return data.view(tensor.dtype).view(tensor.shape)


def read_rows(path: Path, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Rows ``start:stop``; nothing else is read."""
    return read_tensor(path, rows_of(tensor, start, stop))


def rows_of(tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    """Where rows ``start:stop`` are."""
    if not tensor.shape or (start, stop) == (0, tensor.shape[0]):
        return tensor
    row_bytes = tensor.num_bytes // tensor.shape[0]
    shape = (stop - start, *tensor.shape[1:])
    offset = tensor.offset + start * row_bytes
    return StoredTensor(tensor.name, tensor.word, shape, offset, shape[0] * row_bytes)


def has_megatron_names(folder: Path) -> bool:
    """True for a directory whose safetensors have Megatron's names in place of Hugging Face's."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file():
        names: Any = read_json(index).get("weight_map") or ()
    else:
        names = read_header(single) if single.is_file() else ()
    return any(".linear_qkv." in name for name in names)
