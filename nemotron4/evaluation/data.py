"""Benchmark files: what they are, where they come from, and whether the user's copy is the right one.

The package holds no benchmark. A file is read from the data folder, and its content (unpacked, so that a
recompressed copy is the same file) must have the sha256 given here.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemotron4.config import user_cache_dir
from nemotron4.errors import DataError, DownloadError, import_optional
from nemotron4.records import JsonObject

MAX_INFLATED_BYTES = 2**30  # the largest benchmark file has a few hundred MB
FOLDER_VARIABLE = "NEMOTRON4_EVAL_DATA"
HUB = "https://huggingface.co"
Build = Callable[[Callable[[str], bytes]], bytes]


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One input file, by its path in the data folder.

    ``sha256`` is of the unpacked content, None where no canonical file exists. A file comes from one
    ``url``, or is put together by ``build`` from what it downloads; with neither, the user brings it.
    """

    path: str
    sha256: str | None
    source: str
    licence: str
    url: str | None = None
    build: Build | None = None
    same_rows: tuple[str, ...] = ()  # sha256 of other encodings of exactly these rows

    def identity(self, sha256: str) -> str:
        """The hash under which content is known: that of the standard encoding, if the rows are the same."""
        return self.sha256 if self.sha256 is not None and sha256 in self.same_rows else sha256


@dataclass(frozen=True)
class Content:
    """The unpacked bytes of a file, with the hash that identifies them."""

    path: Path
    data: bytes
    sha256: str
    is_expected: bool

    def text(self) -> str:
        try:
            return self.data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: not UTF-8 text: {error.reason}") from error

    def json(self) -> object:
        try:
            return json.loads(self.text())
        except json.JSONDecodeError as error:
            raise DataError(f"{self.path}:{error.lineno}: not valid JSON: {error.msg}") from error

    def json_lines(self) -> Iterator[tuple[int, JsonObject]]:
        """Line number and object of every non-blank line; only the line feed ends a line."""
        for number, line in enumerate(self.text().split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting, too
                raise DataError(f"{self.path}:{number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise DataError(f"{self.path}:{number}: expected a JSON object")
            yield number, row

    def rows(self) -> list[JsonObject]:
        """The objects of a JSON array or of JSON lines."""
        if self.text().lstrip()[:1] == "[":
            rows = self.json()
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise DataError(f"{self.path}: expected an array of objects")
            return rows
        return [row for _, row in self.json_lines()]


def data_folder(given: Path | None = None) -> Path:
    """The folder of benchmark files: the one given, ``$NEMOTRON4_EVAL_DATA``, or the user's cache."""
    if given is not None:
        return given
    if from_environment := os.environ.get(FOLDER_VARIABLE):
        return Path(from_environment)
    return user_cache_dir() / "eval"


def inflated(data: bytes) -> bytes:
    """The data without gzip if it has any; DataError when it grows beyond what any benchmark has."""
    if data[:2] != b"\x1f\x8b":
        return data
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
        content = stream.read(MAX_INFLATED_BYTES + 1)
    if len(content) > MAX_INFLATED_BYTES:
        raise DataError(f"gzip data of {len(data)} bytes grows beyond {MAX_INFLATED_BYTES} bytes; refused")
    return content


def unpack(path: Path) -> bytes:
    """The file's bytes, without gzip if it has any."""
    try:
        return inflated(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


@dataclass(frozen=True)
class DataSource:
    """Where a task's files are looked up. ``replacement`` stands for the task's main (first) file."""

    folder: Path
    replacement: Path | None = None

    def main(self, file: DataFile) -> Content:
        """The task's main file: the user's replacement as it is, or the standard file, its hash checked."""
        if self.replacement is None:
            return self.read(file)
        data = unpack(self.replacement)
        sha256 = file.identity(hashlib.sha256(data).hexdigest())
        return Content(self.replacement, data, sha256, sha256 == file.sha256)

    def read(self, file: DataFile) -> Content:
        """A standard file. Missing or changed is an error that says what is expected and where to get it."""
        path = self.find(file)
        if path is None:
            expected = f"; expected sha256 {file.sha256} (unpacked)" if file.sha256 else ""
            raise DataError(
                f"{self.folder / file.path}: no such file{expected}",
                hint=f"get it from {file.source} ({file.licence}): `nemotron4 eval data fetch`,"
                f" --data FILE, or set {FOLDER_VARIABLE} to the folder that holds {file.path}",
            )
        data = unpack(path)
        sha256 = file.identity(hashlib.sha256(data).hexdigest())
        if file.sha256 is not None and sha256 != file.sha256:
            raise DataError(
                f"{path}: sha256 of the unpacked content is {sha256}; expected {file.sha256}",
                hint="another version of the file gives another benchmark; pass --data FILE to use it anyway",
            )
        return Content(path, data, sha256, file.sha256 is not None)

    def find(self, file: DataFile) -> Path | None:
        """The file with or without ``.gz``, in the data folder or next to the replacement."""
        plain = file.path.removesuffix(".gz")
        candidates = [self.folder / plain, self.folder / f"{plain}.gz"]
        if self.replacement is not None:
            name = Path(plain).name
            candidates += [self.replacement.with_name(name), self.replacement.with_name(f"{name}.gz")]
        return next((path for path in candidates if path.is_file()), None)


def hub_rows(repository: str, file: str) -> Build:
    """Downloads one Parquet file of a data set and writes its rows with their own fields.

    The hub's address is ``$HF_ENDPOINT``. The file is the newest: every result has its hash.
    """

    def build(download: Callable[[str], bytes]) -> bytes:
        parquet = import_optional("pyarrow.parquet", f"reading {repository}")
        hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
        received = download(f"{hub}/datasets/{repository}/resolve/main/{file}")
        try:
            rows = parquet.read_table(io.BytesIO(received)).to_pylist()
        except import_optional("pyarrow", "reading Parquet").ArrowException as error:
            raise DownloadError(f"{repository}, {file}: not a Parquet file: {error}") from error
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    return build
