"""Write large files so that they can be trusted: streamed, hashed, atomic, resumable.

A conversion is a list of files, each of known size and a stream of blocks. A file is written next to its
name and renamed when whole; a journal remembers the hashes of the finished ones, so the same command goes
on after a kill. ``manifest.json`` appears when every file is there.

Blocks are hashed on one thread and written on another while the next is read. Large files go past the page
cache (``O_DIRECT``) where the file system can do that: copying through it takes more processor than reading
and hashing together, and would push out what other programs have cached.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from nemotron4.errors import CheckpointError
from nemotron4.json_form import JsonForm, named
from nemotron4.progress import Progress
from nemotron4.runs import RowLog, publish

BUFFER_BYTES = 8 * 1024**2
NUM_BUFFERS = 4  # one is filled, one hashed, one written, one waits for the slowest of the three
DIRECT_ALIGNMENT = 4096  # of address, offset and length
DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has no such mode


class Written(NamedTuple):
    """What a file holds, by the bytes that were meant."""

    size: int
    sha256: str


@dataclass
class _Buffer:
    """Page-aligned memory and what is still being done with its bytes."""

    data: memoryview
    pending: list[Future[Any]] = field(default_factory=list)

    def settle(self) -> None:
        """Wait until the bytes may be replaced; raises what went wrong with them."""
        for future in self.pending:
            future.result()
        self.pending.clear()


class BlockWriter:
    """Buffers and two threads that serve one file after the other."""

    def __init__(self) -> None:
        self._buffers = [_Buffer(memoryview(mmap.mmap(-1, BUFFER_BYTES))) for _ in range(NUM_BUFFERS)]
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="convert-hash")
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="convert-write")

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        self._disk.shutdown()

    def write(self, path: Path, blocks: Iterable[memoryview | bytes]) -> Written:
        """Make the file; its bytes are on the disk when this returns."""
        digest = hashlib.sha256()
        descriptor = _open(path)
        try:
            size = 0
            for buffer, count in self._filled(blocks):
                data = buffer.data[:count]
                buffer.pending.append(self._hasher.submit(digest.update, data))
                buffer.pending.append(self._disk.submit(_write_at, descriptor, data, size))
                size += count
            for buffer in self._buffers:
                buffer.settle()
            os.fsync(descriptor)
        finally:
            wait([future for buffer in self._buffers for future in buffer.pending])
            for buffer in self._buffers:
                buffer.pending.clear()
            os.close(descriptor)
        return Written(size, digest.hexdigest())

    def _filled(self, blocks: Iterable[memoryview | bytes]) -> Iterator[tuple[_Buffer, int]]:
        """The blocks joined and cut into full buffers; the last one may be shorter."""
        turn, filled = 0, 0
        for block in blocks:
            view = memoryview(block)
            while len(view):
                buffer = self._buffers[turn % NUM_BUFFERS]
                if filled == 0:
                    buffer.settle()
                count = min(len(view), BUFFER_BYTES - filled)
                buffer.data[filled : filled + count] = view[:count]
                view, filled = view[count:], filled + count
                if filled == BUFFER_BYTES:
                    yield buffer, filled
                    turn, filled = turn + 1, 0
        if filled:
            yield self._buffers[turn % NUM_BUFFERS], filled


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """All of the data; what the direct mode does not take (the end of a file) goes through the page cache."""
    while len(data):
        if len(data) % DIRECT_ALIGNMENT:
            _leave_direct(descriptor)
        try:
            count = os.pwrite(descriptor, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not _leave_direct(descriptor):
                raise
            continue
        data, offset = data[count:], offset + count


def _leave_direct(descriptor: int) -> bool:
    """True if the descriptor was in the direct mode until now."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
    return bool(flags & DIRECT)


MANIFEST = "manifest.json"
JOURNAL = ".conversion.jsonl"
PARTIAL = ".partial"

Blocks = Generator[memoryview | bytes, None, Mapping[str, Any] | None]


@dataclass(frozen=True)
class OutputFile:
    """A file to write: exactly ``size`` bytes, in blocks; what ``blocks`` returns goes into the manifest."""

    name: str
    size: int
    blocks: Callable[[], Blocks]


@dataclass(frozen=True)
class Finished(JsonForm):
    """A file that has its final name."""

    name: str
    size: int = field(metadata=named("bytes"))
    sha256: str
    facts: Mapping[str, Any]


def small_file(name: str, data: bytes) -> OutputFile:
    def blocks() -> Blocks:
        yield data
        return None

    return OutputFile(name, len(data), blocks)


def json_file(name: str, value: Any) -> OutputFile:
    return small_file(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_files(
    folder: Path, files: Sequence[OutputFile], settings: Mapping[str, Any], *, is_shown: bool = False
) -> list[Finished]:
    """Write the files in order and then the manifest; finished ones of an earlier run are kept.

    ``settings`` identify the conversion: a folder that holds another one, or other files, is refused.
    ``is_shown``: how far it is, on stderr.
    """
    files = list(files)
    done_before = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if done_before is not None:
        if done_before["settings"] != dict(settings):
            raise _occupied(folder, "another conversion")
        return [Finished.from_json(row) for row in done_before["files"]]
    _make_folder(folder)
    with RowLog(folder / JOURNAL, key=itemgetter("name"), settings=settings) as journal:
        finished = _still_there(folder, journal, files)
        _check_space(folder, sum(file.size for file in files if file.name not in finished))
        total, done = sum(f.size for f in files), sum(f.size for f in finished.values())
        shown = Progress(total, done, unit="bytes") if is_shown else contextlib.nullcontext()
        with BlockWriter() as writer, shown as progress:
            for file in files:
                if file.name not in finished:
                    finished[file.name] = _write(folder, file, writer, progress)
                    journal.append(finished[file.name].to_json())
            rows = [finished[file.name] for file in files]
            manifest = {"settings": dict(settings), "files": [row.to_json() for row in rows]}
            _write(folder, json_file(MANIFEST, manifest), writer, None)
        (folder / JOURNAL).unlink()
    return rows


def read_manifest(folder: Path) -> dict[str, Any]:
    """``{"settings": {...}, "files": [{"name", "bytes", "sha256", "facts"}]}`` of a finished conversion."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        return {"settings": manifest["settings"], "files": manifest["files"]}
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: there is no {MANIFEST}; the conversion is not finished",
            hint="repeat the convert command; it goes on where it stopped",
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a manifest of a conversion: {error!r}") from error


def verify_files(folder: Path) -> int:
    """Re-read every file of the manifest and compare size and hash; returns the number of bytes read."""
    total = 0
    for row in read_manifest(folder)["files"]:
        path = folder / row["name"]
        if not path.is_file() or path.stat().st_size != row["bytes"]:
            found = path.stat().st_size if path.is_file() else "no"
            raise CheckpointError(
                f"{path}: {found} bytes; the manifest says {row['bytes']}",
                hint=f"delete {folder} and convert again",
            )
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != row["sha256"]:
            raise CheckpointError(
                f"{path}: sha256 is {digest}; the manifest says {row['sha256']}",
                hint=f"the file has changed or the disk is failing; delete {folder} and convert again",
            )
        total += row["bytes"]
    return total


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made: {error.strerror}") from error
    if not (folder / JOURNAL).exists() and any(folder.iterdir()):
        raise _occupied(folder, "other files")


def _occupied(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{folder}: holds {what}", hint="give an empty or new folder, or delete this one")


def _still_there(folder: Path, journal: RowLog, files: Iterable[OutputFile]) -> dict[str, Finished]:
    """Files that an earlier run finished and that still have their size."""
    sizes = {file.name: file.size for file in files}
    found = [Finished.from_json(row) for row in journal.rows]
    return {
        row.name: row
        for row in found
        if sizes.get(row.name) == row.size
        and (folder / row.name).is_file()
        and (folder / row.name).stat().st_size == row.size
    }


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{folder}: the conversion writes {needed:,} more bytes, the disk has {free:,} free",
            hint="free some space or choose another disk",
        )


def _write(folder: Path, file: OutputFile, writer: BlockWriter, progress: Progress | None) -> Finished:
    path = folder / file.name
    partial = path.with_name(f".{path.name}{PARTIAL}")
    path.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    try:
        written = writer.write(partial, _metered(file, progress, facts))
        if written.size != file.size:
            raise AssertionError(f"{file.name}: {written.size} bytes written, {file.size} planned")
        publish(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{path}: the disk is full", hint="free some space, then repeat the command; it goes on here"
            ) from error
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return Finished(file.name, file.size, written.sha256, facts)


def _metered(
    file: OutputFile, progress: Progress | None, facts: dict[str, Any]
) -> Iterator[memoryview | bytes]:
    """The blocks of the file; ``facts`` receives what they return at their end."""

    def blocks() -> Blocks:
        facts.update((yield from file.blocks()) or {})
        return None

    for block in blocks():
        yield block
        if progress is not None:
            progress.add(len(block), detail=file.name)
