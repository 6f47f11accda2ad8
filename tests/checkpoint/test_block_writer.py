"""Files hold the blocks that were given, whatever their sizes, and errors of the disk come out."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron4.checkpoint.convert_files import BUFFER_BYTES, NUM_BUFFERS, BlockWriter, Written

SIZES = (0, 5, 4096, BUFFER_BYTES, (NUM_BUFFERS + 1) * BUFFER_BYTES + 123)


def cut(data: bytes, size: int) -> Iterator[memoryview]:
    for start in range(0, len(data), size):
        yield memoryview(data)[start : start + size]


def test_one_writer_makes_files_of_every_size(tmp_path: Path) -> None:
    pattern = bytes(range(251))  # no period of it fits a buffer
    data = pattern * (max(SIZES) // len(pattern) + 1)
    with BlockWriter() as writer:
        for size in SIZES:
            path = tmp_path / str(size)
            expected = data[:size]
            written = writer.write(path, cut(expected, 3 * 1024**2 + 1))
            assert written == Written(size, hashlib.sha256(expected).hexdigest())
            assert path.read_bytes() == expected


def test_a_disk_that_fills_up_is_an_error_and_the_writer_goes_on(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with BlockWriter() as writer:
        with pytest.raises(OSError, match="No space left") as caught:
            writer.write(full, cut(bytes(2 * BUFFER_BYTES), BUFFER_BYTES))
        assert caught.value.errno == errno.ENOSPC
        assert writer.write(tmp_path / "next", [b"whole"]).size == 5
    assert (tmp_path / "next").read_bytes() == b"whole"
