"""The files of a NeMo checkpoint and its zarr tensors, read in place from a directory or a ``.nemo`` tar.

A tar is never extracted: members are found by name and read at their offset, so no name of a hostile
archive reaches the file system. A gzip tar is first inflated, once per machine (inflate.py).

Megatron stores bfloat16 under the illegal zarr v2 dtype "bfloat16", so ``.zarray`` is parsed as plain
JSON and chunks are viewed as 16-bit words. Each chunk is one file; its size is checked before it is
read, and a missing chunk is an error, never zeros.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import tarfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nemotron4.checkpoint.inflate import InflatedArchive, inflate
from nemotron4.errors import CheckpointError

GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class _Extent:
    """Where the bytes of one file lie: in its own file, or inside the archive."""

    size: int
    offset: int
    path: Path | None  # None: in the inflated archive


class NemoFiles:
    """Relative POSIX names and positioned reads. Nothing is held in memory but the names."""

    def __init__(
        self, source: Path, extents: dict[str, _Extent], inflated: InflatedArchive | None = None
    ) -> None:
        self.source = source
        self._extents = extents
        self._inflated = inflated
        if inflated is not None:
            weakref.finalize(self, inflated.release)

    @property
    def names(self) -> list[str]:
        return sorted(self._extents)

    def __contains__(self, name: str) -> bool:
        return name in self._extents

    def size(self, name: str) -> int:
        return self._extent(name).size

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the file's bytes from ``offset``; a short file is an error."""
        extent = self._extent(name)
        if offset < 0 or offset + len(buffer) > extent.size:
            raise CheckpointError(
                f"{self.source}: {name} has {extent.size} bytes; expected at least {offset + len(buffer)}",
                hint="the file is cut short; copy or download it again",
            )
        try:
            if extent.path is not None:
                with extent.path.open("rb", buffering=0) as file:
                    self._fill(name, file.fileno(), extent.offset + offset, buffer)
            else:
                assert self._inflated is not None
                self._fill(name, self._inflated.file.fileno(), extent.offset + offset, buffer)
        except OSError as error:
            raise CheckpointError(f"{self.source}: {name} cannot be read: {error.strerror}") from error

    def read(self, name: str, *, limit_bytes: int = 64 * 1024**2) -> bytes:
        """The whole of a small file (settings, index, tokenizer)."""
        size = self.size(name)
        if size > limit_bytes:
            raise CheckpointError(f"{self.source}: {name} has {size} bytes; expected at most {limit_bytes}")
        data = bytearray(size)
        self.read_into(name, 0, memoryview(data))
        return bytes(data)

    def _fill(self, name: str, descriptor: int, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.source}: {name} ended after {done} of {len(buffer)} bytes",
                    hint="the file is cut short; copy or download it again",
                )
            done += count

    def _extent(self, name: str) -> _Extent:
        try:
            return self._extents[name]
        except KeyError:
            raise CheckpointError(
                f"{self.source}: {name} is missing", hint="the checkpoint is incomplete; download it again"
            ) from None


def open_nemo_files(path: Path) -> NemoFiles:
    """Open an extracted directory or a ``.nemo`` file. CheckpointError if it is neither."""
    if path.is_dir():
        return _open_directory(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or directory")
    return _open_tar(path)


def _open_directory(root: Path) -> NemoFiles:
    # Links are followed: a hub cache keeps its files as links into a blob store.
    extents = {}
    for folder, _, files in os.walk(root, followlinks=True):
        for file in files:
            path = Path(folder, file)
            extents[path.relative_to(root).as_posix()] = _Extent(path.stat().st_size, 0, path)
    return NemoFiles(root, extents)


def _open_tar(path: Path) -> NemoFiles:
    with path.open("rb") as file:
        is_gzip = file.read(2) == GZIP_MAGIC
        if not is_gzip:
            return NemoFiles(path, _tar_extents(path, file, path))
    inflated = inflate(path)
    try:
        return NemoFiles(path, _tar_extents(path, inflated.file, None), inflated)
    except BaseException:
        inflated.release()
        raise


def _tar_extents(path: Path, file: BinaryIO, container: Path | None) -> dict[str, _Extent]:
    end = os.fstat(file.fileno()).st_size
    file.seek(0)
    extents: dict[str, _Extent] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                _check_member(path, member, end)
                name = posixpath.normpath(member.name)
                if name in extents:
                    raise CheckpointError(f"{path}: member {name!r} occurs twice")
                if not member.isdir():
                    extents[name] = _Extent(member.size, member.offset_data, container)
    except tarfile.TarError as error:
        raise CheckpointError(
            f"{path}: not a tar archive: {error}", hint="a .nemo file is a tar, plain or gzip"
        ) from error
    return extents


def _check_member(path: Path, member: tarfile.TarInfo, end: int) -> None:
    if posixpath.isabs(member.name) or ".." in member.name.split("/") or "\\" in member.name:
        raise CheckpointError(
            f"{path}: member {member.name!r} points outside the archive; refused",
            hint="do not use this file; it was not written by NeMo",
        )
    if not member.isdir() and (not member.isreg() or member.sparse is not None):
        raise CheckpointError(
            f"{path}: member {member.name!r} is not a plain file (links and devices are refused)"
        )
    if member.offset_data + member.size > end:
        raise CheckpointError(
            f"{path}: member {member.name!r} ends at byte {member.offset_data + member.size}, "
            f"the archive at {end}",
            hint="the archive is cut short; download it again",
        )


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
class NemoTensor:
    """One tensor of the checkpoint: global shape and the chunks that cover it exactly once."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


def read_rows_into(
    files: NemoFiles, tensor: NemoTensor, index: tuple[int, ...], start: int, rows_RC: torch.Tensor
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
    tensor: NemoTensor,
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


def read_zarr_index(files: NemoFiles, folder: str) -> Mapping[str, NemoTensor]:
    """Every ``<folder>/<key>/.zarray``; folders without one (extra states) are never opened."""
    prefix, suffix = f"{folder}/" if folder else "", "/.zarray"
    names = [name for name in files.names if name.startswith(prefix) and name.endswith(suffix)]
    keys = [name.removeprefix(prefix).removesuffix(suffix) for name in names]
    return {key: _parse(files, name, key) for key, name in zip(keys, names, strict=True)}


def _parse(files: NemoFiles, name: str, key: str) -> NemoTensor:
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
    return NemoTensor(key, shape, dtype, found)


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
