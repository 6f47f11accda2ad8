"""What a run is made of, as hashes: so that it never continues with another input or another model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from nemotron4.errors import DataError

SAMPLE_BYTES = 1 << 20


def file_digest(path: Path) -> str:
    """SHA-256 of the whole file, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def model_digest(path: Path) -> str:
    """SHA-256 over name, size, first and last MiB of each file of a model.

    Enough to tell two models apart; hashing all 680 GB of the largest would take an hour.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path) if file != path else file.name}:{size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(SAMPLE_BYTES))
            stream.seek(max(0, size - SAMPLE_BYTES), os.SEEK_SET)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
