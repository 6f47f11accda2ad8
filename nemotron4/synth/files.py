"""Rows of data files of any form that training reads, also from the Hugging Face hub.

A file on the hub is named ``hf://datasets/OWNER/NAME/PATH`` or ``hf://datasets/OWNER/NAME@REVISION/PATH``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import orjson

from nemotron4.errors import ConfigError, DataError
from nemotron4.records import JsonObject
from nemotron4.row_files import raw_rows

_HUB = "hf:/datasets/"  # a path has lost the second slash


def data_rows(file: Path, limit: int = 0) -> Iterator[tuple[str, JsonObject]]:
    """(``file:line``, row) of each row, at most ``limit`` if it is not 0."""
    path = local_file(file)
    if not path.exists():
        raise ConfigError(
            f"{file}: there is no such file", hint="paths in a recipe count from the working folder"
        )
    for number, (where, row) in enumerate(raw_rows(path)):
        if limit and number >= limit:
            return
        if isinstance(row, str):
            raise DataError(f"{where}: {row}")
        try:
            orjson.dumps(row, default=str)
        except TypeError as error:  # an integer of more than 64 bits, deep nesting, half of a surrogate pair
            is_half = "surrogates" in str(error)
            reason = "a text has half of a character pair" if is_half else f"the row cannot be kept: {error}"
            raise DataError(f"{where}: {reason}") from error
        yield where, row


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
