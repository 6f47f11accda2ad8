"""Tensors of a Megatron zarr checkpoint, read by hand.

Megatron stores bfloat16 under the illegal zarr v2 dtype "bfloat16", so ``.zarray`` is parsed as plain
JSON and chunks are viewed as 16-bit words. Each chunk is one file; its size is checked before it is
read, and a missing chunk is an error, never zeros.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from nemotron4.checkpoint.nemo_files import NemoFiles
from nemotron4.errors import CheckpointError

DTYPES = {"bfloat16": torch.bfloat16, "<f2": torch.float16, "<f4": torch.float32}


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor that lies C-contiguous in one file, from byte ``offset`` on."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]  # shape on disk; larger than ``shape`` at the edge of a zarr array
    file: str
    offset: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint: global shape and the chunks that cover it exactly once."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


def read_rows_into(
    files: NemoFiles, tensor: StoredTensor, index: tuple[int, ...], start: int, rows_RC: torch.Tensor
) -> None:
    """Fill ``rows_RC`` with the rows from ``start`` of the tensor at the leading ``index``.

    ``index`` is the layer of a stacked tensor, or (). A vector is one column.
    """
    stop = start + rows_RC.shape[0]
    filled = 0
    for chunk in tensor.chunks:
        if any(not s <= i < s + n for i, s, n in zip(index, chunk.start, chunk.shape, strict=False)):
            continue
        row, height, column, width = _rows_and_columns(chunk.start, chunk.shape, len(index))
        first, last = max(start, row), min(stop, row + height)
        if first < last:
            target_RC = rows_RC[first - start : last - start, column : column + width]
            _read_chunk_rows(files, tensor, chunk, index, first, target_RC)
            filled += target_RC.numel()
    assert filled == rows_RC.numel(), f"{tensor.key}: {filled} of {rows_RC.numel()} values found"


def _rows_and_columns(
    start: tuple[int, ...], shape: tuple[int, ...], depth: int
) -> tuple[int, int, int, int]:
    """First row, rows, first column, columns; a vector is one column."""
    is_matrix = len(shape) - depth == 2
    return start[depth], shape[depth], start[-1] if is_matrix else 0, shape[-1] if is_matrix else 1


def _read_chunk_rows(
    files: NemoFiles,
    tensor: StoredTensor,
    chunk: StoredChunk,
    index: tuple[int, ...],
    first: int,
    target_RC: torch.Tensor,
) -> None:
    """Rows of the chunk from the global row ``first`` on, into a part of the result."""
    row, height, _, width = _rows_and_columns(chunk.start, chunk.stored_shape, len(index))
    leading = 0
    for i, begin, size in zip(index, chunk.start, chunk.stored_shape, strict=False):
        leading = leading * size + (i - begin)
    offset = chunk.offset + (leading * height + first - row) * width * tensor.dtype.itemsize
    if target_RC.is_contiguous() and target_RC.shape[1] == width:
        files.read_into(chunk.file, offset, as_bytes(target_RC))
        return
    stored_RC = torch.empty((target_RC.shape[0], width), dtype=tensor.dtype)
    files.read_into(chunk.file, offset, as_bytes(stored_RC))
    # As integers and by numpy: one thread is enough for a copy, and torch would start a team for it.
    words = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    target_RC.view(words).numpy()[:] = stored_RC[:, : target_RC.shape[1]].view(words).numpy()


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor; writing to it writes the tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_zarr_index(files: NemoFiles, folder: str) -> Mapping[str, StoredTensor]:
    """Every ``<folder>/<key>/.zarray``; folders without one (extra states) are never opened."""
    prefix, suffix = f"{folder}/" if folder else "", "/.zarray"
    names = [name for name in files.names if name.startswith(prefix) and name.endswith(suffix)]
    keys = [name.removeprefix(prefix).removesuffix(suffix) for name in names]
    return {key: _parse(files, name, key) for key, name in zip(keys, names, strict=True)}


def _parse(files: NemoFiles, name: str, key: str) -> StoredTensor:
    where = f"{files.source}: {name}"
    try:
        array: Any = json.loads(files.read(name, limit_bytes=1024**2))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(array, dict):
        raise CheckpointError(f"{where}: expected a JSON object")
    for field, expected in (("zarr_format", 2), ("compressor", None), ("order", "C")):
        if array.get(field) != expected:
            raise CheckpointError(f"{where}: {field} is {array.get(field)!r}; expected {expected!r}")
    if array.get("filters"):
        raise CheckpointError(f"{where}: filters are {array['filters']!r}; expected none")
    separator = array.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise CheckpointError(f"{where}: dimension_separator is {separator!r}; expected '.' or '/'")
    dtype = DTYPES.get(array.get("dtype", ""))
    if dtype is None:
        raise CheckpointError(f"{where}: dtype is {array.get('dtype')!r}; expected {', '.join(DTYPES)}")
    shape, chunks = _sizes(array, "shape", where), _sizes(array, "chunks", where)
    if len(shape) != len(chunks) or not 1 <= len(shape) <= 3:
        raise CheckpointError(f"{where}: shape {list(shape)} and chunks {list(chunks)} do not fit")
    folder = name.removesuffix("/.zarray")
    found = tuple(_chunks(files, folder, shape, chunks, separator, dtype.itemsize))
    return StoredTensor(key, shape, dtype, found)


def _sizes(array: dict[str, Any], field: str, where: str) -> tuple[int, ...]:
    values = array.get(field)
    if not isinstance(values, list) or not all(type(v) is int and v > 0 for v in values):
        raise CheckpointError(f"{where}: {field} is {values!r}; expected a list of positive integers")
    return tuple(values)


def _chunks(
    files: NemoFiles,
    folder: str,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    separator: str,
    itemsize: int,
) -> Iterator[StoredChunk]:
    grid = [math.ceil(size / step) for size, step in zip(shape, chunk, strict=True)]
    expected = math.prod(chunk) * itemsize
    if math.prod(grid) > len(files.names):
        raise CheckpointError(
            f"{files.source}: {folder} needs {math.prod(grid)} chunk files; the checkpoint has "
            f"{len(files.names)} files in all",
            hint="the checkpoint is incomplete; download it again",
        )
    for position in product(*map(range, grid)):
        file = f"{folder}/{separator.join(map(str, position))}"
        if file not in files:
            raise CheckpointError(
                f"{files.source}: chunk {file} is missing",
                hint="the checkpoint is incomplete; download it again (a missing chunk is never zeros)",
            )
        if files.size(file) != expected:
            raise CheckpointError(
                f"{files.source}: chunk {file} has {files.size(file)} bytes; expected {expected}"
            )
        start = tuple(p * step for p, step in zip(position, chunk, strict=True))
        inside = tuple(min(step, size - s) for s, step, size in zip(start, chunk, shape, strict=True))
        yield StoredChunk(start, inside, chunk, file, 0)
