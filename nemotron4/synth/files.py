"""Rows of data files: JSON lines (also .gz and .zst), Parquet, and both from the Hugging Face hub.

A file on the hub is named ``hf://datasets/OWNER/NAME/PATH`` or ``hf://datasets/OWNER/NAME@REVISION/PATH``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from nemotron4.errors import ConfigError, DataError, import_optional
from nemotron4.records import JsonObject, read_json_lines

_HUB = "hf:/datasets/"  # a path has lost the second slash


def data_rows(file: Path, limit: int = 0) -> Iterator[tuple[str, JsonObject]]:
    """(``file:line`` or ``file: row n``, row) of each row, at most ``limit`` if it is not 0."""
    path = local_file(file)
    if not path.exists():
        raise ConfigError(
            f"{file}: there is no such file", hint="paths in a recipe count from the working folder"
        )
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
    for number, (where, row) in enumerate(rows):
        if limit and number >= limit:
            return
        try:
            orjson.dumps(row, default=str)
        except TypeError as error:  # an integer of more than 64 bits, deep nesting
            raise DataError(f"{where}: the row cannot be kept: {error}") from error
        yield where, row


def _json_rows(path: Path) -> Iterator[tuple[str, JsonObject]]:
    for line, row in read_json_lines(path):
        yield f"{path}:{line}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, JsonObject]]:
    parquet: Any = import_optional("pyarrow.parquet", "reading Parquet")
    arrow: Any = import_optional("pyarrow", "reading Parquet")
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error


def digests(file: Path) -> list[str]:
    """Of the bytes of a file, or of the Python files of a folder; nothing of what is not there."""
    file = local_file(file)
    found = []
    for part in sorted(file.rglob("*.py")) if file.is_dir() else [file] if file.is_file() else []:
        with part.open("rb") as stream:
            found.append(hashlib.file_digest(stream, "blake2b").hexdigest())
    return found


def local_file(file: Path) -> Path:
    """The file itself, or a downloaded copy of one on the hub."""
    name = str(file)
    if not name.startswith(_HUB):
        return file
    owner, _, rest = name.removeprefix(_HUB).partition("/")
    dataset, _, path = rest.partition("/")
    dataset, _, revision = dataset.partition("@")
    if not path:
        raise ConfigError(f"{file}: names no file", hint="write it as hf://datasets/OWNER/NAME/PATH")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            hf_hub_download(f"{owner}/{dataset}", path, repo_type="dataset", revision=revision or None)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        shown = str(error).strip().splitlines()[0]
        raise DataError(f"{file}: cannot be fetched from the hub: {shown}") from error
