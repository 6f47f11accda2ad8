"""The files of a NeMo checkpoint, read in place from a directory or from a ``.nemo`` tar (plain or gzip).

A tar is never extracted: members are found by name and read at their offset, so no name of a hostile
archive reaches the file system. A gzip tar is first inflated into an unnamed temporary file.
"""

from __future__ import annotations

import gzip
import os
import posixpath
import tarfile
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from nemotron4.errors import CheckpointError

LEAST_INFLATED_LIMIT = 2**30  # bytes; small files of zeros are honest
MAX_INFLATION = 20  # bfloat16 weights shrink by a quarter
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class _Extent:
    """Where the bytes of one file lie: in its own file, or inside the archive."""

    size: int
    offset: int
    path: Path | None  # None: in the inflated archive


class NemoFiles:
    """Relative POSIX names and positioned reads. Nothing is held in memory but the names."""

    def __init__(self, source: Path, extents: dict[str, _Extent], inflated: BinaryIO | None = None) -> None:
        self.source = source
        self._extents = extents
        self._inflated = inflated
        if inflated is not None:
            weakref.finalize(self, inflated.close)

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
                self._fill(name, self._inflated.fileno(), extent.offset + offset, buffer)
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
    inflated = _inflate(path)
    try:
        return NemoFiles(path, _tar_extents(path, inflated, None), inflated)
    except BaseException:
        inflated.close()
        raise


def _inflate(path: Path) -> BinaryIO:
    """The gzip file's content as an unnamed temporary file; it vanishes with the process.

    Weights hardly compress: an archive that grows as they never do is refused before it fills the disk.
    """
    limit = max(LEAST_INFLATED_LIMIT, MAX_INFLATION * path.stat().st_size)
    plain = cast("BinaryIO", tempfile.TemporaryFile(prefix="nemotron4-"))  # noqa: SIM115
    try:
        with gzip.open(path) as inflated:
            while piece := inflated.read(8 * 1024**2):
                if plain.tell() + len(piece) > limit:
                    raise OSError(f"it grows beyond {limit} bytes, {MAX_INFLATION} times its size")
                plain.write(piece)
        plain.flush()
    except (OSError, EOFError) as error:
        plain.close()
        raise CheckpointError(
            f"{path}: cannot be inflated into {tempfile.gettempdir()}: {error}",
            hint="set TMPDIR to a folder with room for the uncompressed archive, or download the file again",
        ) from error
    return plain


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
