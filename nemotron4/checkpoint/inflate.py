"""A gzip archive inflated once per machine: the first process that needs it writes it, all others share it.

The plain file is in a folder of the user's own below ``TMPDIR`` and goes with the last process that uses it.
After kill -9 it stays, and the next start takes it as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nemotron4.errors import CheckpointError
from nemotron4.runs import replacing

LEAST_LIMIT = 2**30  # bytes; small files of zeros are honest
MAX_INFLATION = 20  # bfloat16 weights shrink by a quarter


@dataclass(frozen=True)
class InflatedArchive:
    """The plain bytes, and the shared lock that says that this process uses them."""

    file: BinaryIO
    path: Path
    users: BinaryIO

    def release(self) -> None:
        """Close it; the last user on this machine deletes the plain file."""
        self.file.close()
        with _alone(self.path), contextlib.suppress(BlockingIOError):
            fcntl.flock(self.users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.path.unlink(missing_ok=True)
        self.users.close()


@contextlib.contextmanager
def _alone(plain: Path) -> Iterator[None]:
    """Nobody else on this machine writes, joins or leaves meanwhile."""
    with plain.with_suffix(".lock").open("a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def inflate(archive: Path) -> InflatedArchive:
    """The content of a gzip file. CheckpointError if it is damaged, or grows as weights never do."""
    try:
        folder = _own_folder()
        state = archive.stat()
        identity = f"{archive.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ino}"
        plain = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.tar"
        with _alone(plain):
            if not plain.exists():
                _write(archive, plain, max(LEAST_LIMIT, MAX_INFLATION * state.st_size))
            users = plain.with_suffix(".users").open("a+b")
            fcntl.flock(users, fcntl.LOCK_SH)
            return InflatedArchive(plain.open("rb"), plain, users)
    except (OSError, EOFError) as error:
        raise CheckpointError(
            f"{archive}: cannot be inflated into {tempfile.gettempdir()}: {error}",
            hint="set TMPDIR to a folder with room for the uncompressed archive, or download the file again",
        ) from error


def _own_folder() -> Path:
    """Nobody else may write there: what lies in it is taken for the archive's content."""
    folder = Path(tempfile.gettempdir(), f"nemotron4-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise OSError(f"{folder} is not a folder that only you may write")
    return folder


def _write(archive: Path, plain: Path, limit: int) -> None:
    with gzip.open(archive) as packed, replacing(plain) as file:
        while piece := packed.read(8 * 1024**2):
            if file.tell() + len(piece) > limit:
                raise OSError(f"it grows beyond {limit} bytes, {MAX_INFLATION} times its size")
            file.write(piece)
