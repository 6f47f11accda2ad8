"""Files to rows: every row read, every problem named by file and line, none silently dropped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemotron4.errors import DataError
from nemotron4.records import FieldError, numbered_lines, open_text
from nemotron4.training.formats import Kind, Row, parse


@dataclass(frozen=True)
class Problem:
    """Why a row cannot be used. ``where`` is ``file:line``."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class ReadRow:
    """A row, where it stands and its raw object (for ``--write-clean``)."""

    where: str
    row: Row
    raw: Any = field(repr=False)


def files_of(path: Path) -> list[Path]:
    """The files behind a path: itself, or those of a folder.

    Of a folder that ``datasets`` saved to disk, what it lists. DataError for a folder without rows, and for
    one with several splits, of which one must be named.
    """
    if not path.is_dir():
        return [path]
    state = path / "state.json"
    if state.is_file():
        return [path / entry["filename"] for entry in _saved_state(state)]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").is_file())
        raise DataError(
            f"{path}: a data set with the splits {', '.join(splits)}", hint=f"name one: {path / splits[0]}"
        )
    found = sorted(entry for entry in path.iterdir() if _has_rows(entry))
    if not found:
        raise DataError(f"{path}: no .jsonl, .parquet or .txt file is in the folder")
    return found


def _saved_state(state: Path) -> list[dict[str, str]]:
    try:
        files: list[dict[str, str]] = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{state}: not the state of a saved data set: {error!r}") from error
    for entry in files:
        if Path(entry["filename"]).name != entry["filename"]:
            raise DataError(f"{state}: {entry['filename']!r} is not a plain file name")
    return files


def _has_rows(path: Path) -> bool:
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    return name.endswith((".jsonl", ".txt", ".parquet")) and not name.startswith(".")


def read_rows(paths: Sequence[Path], kind: Kind) -> tuple[list[ReadRow], list[Problem]]:
    """Every row of every file, good or bad. DataError only for a file that cannot be read at all."""
    rows: list[ReadRow] = []
    problems: list[Problem] = []
    for file in (file for path in paths for file in files_of(path)):
        for where, value in _raw_rows(file, kind):
            if isinstance(value, str):
                problems.append(Problem(where, value))
                continue
            try:
                rows.append(ReadRow(where, parse(kind, value), value))
            except FieldError as error:
                problems.append(Problem(where, str(error)))
    return rows, problems


def refuse_too_many(problems: Sequence[Problem], num_rows: int, max_bad_rows: int) -> None:
    """DataError with the first problems if there are more than allowed."""
    if len(problems) > max_bad_rows:
        shown = "\n".join(f"  {problem}" for problem in problems[:5])
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(
            f"{len(problems)} of {num_rows} rows cannot be used (data.max_bad_rows is {max_bad_rows}):\n"
            f"{shown}{more}",
            hint="nemotron4 doctor data shows every one and writes a clean copy with --write-clean",
        )


def _raw_rows(path: Path, kind: Kind) -> Iterator[tuple[str, Any]]:
    """``file:line`` and the row's object, or a string that says what is wrong with the line."""
    names = path.name.removesuffix(".gz").removesuffix(".zst")
    if path.suffix in (".parquet", ".arrow"):
        yield from _table_rows(path)
    elif names.endswith(".txt"):
        yield f"{path}:1", {"text": _whole_text(path)}
    elif kind == "reward_pairs":
        yield from _paired_texts(_json_rows(path))
    else:
        yield from _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        for number, line in numbered_lines(path):
            if line.strip():
                yield f"{path}:{number}", _json_object(line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _json_object(line: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg} (column {error.colno})"
    except (ValueError, RecursionError) as error:
        return f"not valid JSON: {error}"
    return value if isinstance(value, dict) else "the line is not a JSON object"


def _paired_texts(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """NeMo-Aligner's binary reward rows ``{"text"}``: odd lines are chosen, the lines after them rejected."""
    first: tuple[str, Any] | None = None
    for where, row in rows:
        is_half = isinstance(row, dict) and set(row) == {"text"}
        if first is None and is_half:
            first = (where, row)
        elif first is not None:
            if is_half:
                pair = {"prompt": "", "chosen": first[1]["text"], "rejected": row["text"]}
                yield first[0], pair
            else:
                yield first[0], "a chosen text without the rejected text that should follow"
                yield where, row
            first = None
        else:
            yield where, row
    if first is not None:
        yield first[0], "a chosen text without the rejected text that should follow"


def _table_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Parquet, or the Arrow stream that ``save_to_disk`` writes."""
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"reading {path.suffix} needs the package pyarrow", hint="pip install pyarrow"
        ) from error
    try:
        if path.suffix == ".arrow":
            with pyarrow.memory_map(str(path)) as source:
                table = pyarrow.ipc.open_stream(source).read_all()
        else:
            table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}:{number}", {name: value for name, value in row.items() if value is not None}


def _whole_text(path: Path) -> str:
    with open_text(path) as stream:
        return stream.read()
