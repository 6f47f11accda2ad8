"""Files from streams of blocks: hashed on one thread and written on another while the next block is read.

Large files go past the page cache (``O_DIRECT``) where the file system can do that. Copying them through it
takes more processor than reading and hashing together, and would push out what other programs have cached.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

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
