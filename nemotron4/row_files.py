"""Rows of files as they are: JSON lines, a JSON list, CSV, TSV, text, Parquet, Arrow, told by the name.

``.gz`` and ``.zst`` are unpacked. Cells of CSV are texts; a text file is one row.
"""

from __future__ import annotations

import csv
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemotron4.errors import DataError, import_optional
from nemotron4.records import JsonObject, load_json, numbered_lines, open_text

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".feather")
csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def plain_name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".zst")


def is_separated(path: Path) -> bool:
    """Whether every value of it is a text."""
    return plain_name(path).endswith((".csv", ".tsv"))


def raw_rows(
    path: Path, *, encoding: str = "utf-8", hint: str | None = None
) -> Iterator[tuple[str, JsonObject | str]]:
    """``file:line`` and the row's object, or a string that says what is wrong with the line.

    DataError for a file that cannot be read; ``hint`` is what to do about one that is Latin-1.
    """
    name = plain_name(path)
    if name.endswith((".parquet", ".arrow", ".feather")):
        yield from _table_rows(path)
        return
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding  # with a byte order mark or without
    try:
        if name.endswith(".txt"):
            with open_text(path, encoding) as stream:
                yield f"{path}:1", {"text": stream.read()}
        elif is_separated(path):
            yield from _separated_rows(path, "\t" if name.endswith(".tsv") else ",", encoding)
        elif name.endswith(".json") and _begins_list(path, encoding):
            yield from _listed_rows(path, encoding)
        else:
            for number, line in numbered_lines(path, encoding):
                if line.strip():
                    yield f"{path}:{number}", _json_object(line)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        if error.start == 0 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(
                f"{path}: UTF-16, not UTF-8", hint=f"iconv -f utf-16 -t utf-8 {path} writes it in UTF-8"
            ) from error
        raise DataError(
            f"{path}: not UTF-8: byte 0x{byte:02x}, which is {bytes([byte]).decode('latin-1')!r} in Latin-1",
            hint=hint or f"iconv -f latin1 -t utf-8 {path} writes it in UTF-8, if it is Latin-1",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _json_object(line: str) -> JsonObject | str:
    try:
        value = load_json(line)
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} (column {error.colno})"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON: {error}"
    return value if isinstance(value, dict) else "the line is not a JSON object"


def _begins_list(path: Path, encoding: str) -> bool:
    with open_text(path, encoding) as stream:
        while character := stream.read(1):
            if not character.isspace():
                return character == "["
    return False


def _listed_rows(path: Path, encoding: str) -> Iterator[tuple[str, JsonObject | str]]:
    """One JSON list; a row's line is its number in the list."""
    with open_text(path, encoding) as stream:
        text = stream.read()
    try:
        values = load_json(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    for number, value in enumerate(values, start=1):
        yield f"{path}:{number}", value if isinstance(value, dict) else "the entry is not a JSON object"


def _separated_rows(path: Path, delimiter: str, encoding: str) -> Iterator[tuple[str, JsonObject | str]]:
    with open_text(path, encoding, newline="") as stream:
        reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            names = list(reader.fieldnames or ())
            if len(set(names)) < len(names):
                raise DataError(f"{path}: two columns of the header have one name: {', '.join(names)}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    yield where, f"the row has not the {len(names)} fields of the header"
                else:
                    yield where, dict(row)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


def _table_rows(path: Path) -> Iterator[tuple[str, JsonObject | str]]:
    """Parquet, or Arrow as ``save_to_disk`` and ``write_feather`` write it, a batch at a time."""
    pyarrow = import_optional("pyarrow", f"reading {path.suffix}")
    for name in ("pyarrow.ipc", "pyarrow.parquet"):
        import_optional(name, f"reading {path.suffix}")
    try:
        number = 0
        for batch in _batches(path, pyarrow):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", plain(row)
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _batches(path: Path, pyarrow: Any) -> Iterator[Any]:
    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=1024)
        return
    with pyarrow.memory_map(str(path)) as source:
        try:
            yield from pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))


def plain(row: JsonObject) -> JsonObject:
    """A table's row as JSON lines have it: a null of its own is told from a column that is not there."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """In Arrow every object of a column has the fields of all; a call would train other tools' arguments."""
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value
