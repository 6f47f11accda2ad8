"""Rows of a long run, on disk the moment they are finished, in input order once all of them are.

A run with output ``answers.jsonl`` keeps ``answers.jsonl.partial`` while it works: a first line that says
what the run is made of, then one line for each finished row, in the order they finish, flushed to the disk.
When the last row is there, ``answers.jsonl`` appears whole, beside ``answers.jsonl.run.json`` (what the run
was made of), and the partial file goes. Killed at any moment, the same run continues where it stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from nemotron4 import records
from nemotron4.errors import DataError
from nemotron4.records import JsonObject


class Journal:
    """The finished rows of one run. Use as a context manager; one process at a time may hold it."""

    def __init__(self, output: Path, run: Mapping[str, object]) -> None:
        """Start or continue the run ``run`` that writes ``output``.

        Raises DataError when the files on disk belong to a different run, or another process works on it.
        """
        self.output = output
        self.run = dict(run)
        self._partial = output.with_name(output.name + ".partial")
        self._record = output.with_name(output.name + ".run.json")
        self._places: dict[int, tuple[int, int]] = {}  # row number -> offset and length of its line
        self.num_torn_bytes = 0
        self.is_complete = not self._partial.exists() and self._is_finished()
        if not self.is_complete:
            self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.is_complete:
            self._file.close()

    @property
    def rows_done(self) -> frozenset[int]:
        return frozenset(self._places)

    def append(self, rows: Sequence[tuple[int, JsonObject]]) -> None:
        """Keep finished rows (number, value): they are on the disk when this returns."""
        end = self._file.seek(0, os.SEEK_END)
        lines = []
        for number, value in rows:
            assert number not in self._places, f"row {number} was finished twice"
            lines.append(_line({"row": number, "value": value}))
            self._places[number] = end, len(lines[-1])
            end += len(lines[-1])
        self._write(b"".join(lines))

    def values(self) -> Iterator[JsonObject]:
        """The finished rows in input order."""
        for number in sorted(self._places):
            offset, length = self._places[number]
            yield json.loads(os.pread(self._file.fileno(), length, offset))["value"]

    def finish(self) -> None:
        """All rows are there: give the output its name."""
        partial_record = self._record.with_name(self._record.name + ".partial")
        partial_record.write_text(json.dumps(self.run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial_record.replace(self._record)
        records.write(self.output, self.values())
        self._partial.unlink()

    def _is_finished(self) -> bool:
        """True when the output exists and this very run wrote it."""
        if not self.output.exists():
            return False
        try:
            earlier = json.loads(self._record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            earlier = None
        if earlier != _as_stored(self.run):
            raise DataError(
                f"{self.output} exists already"
                + ("" if earlier is None else f" and is of another run: {_difference(earlier, self.run)}"),
                hint="choose another output, or remove it",
            )
        return True

    def _open(self) -> None:
        try:
            self._file = self._partial.open("a+b", buffering=0)
        except OSError as error:
            raise DataError(f"{self._partial}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise DataError(
                f"{self._partial} is in use", hint="another process works on this output; wait for it"
            ) from error
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        """Index the rows of an earlier start; cut off what was torn while it was written."""
        self._file.seek(0)
        position = 0
        with os.fdopen(os.dup(self._file.fileno()), "rb") as lines:
            for index, line in enumerate(lines):
                value = _parsed(line)
                if value is None:
                    break
                if index == 0:
                    self._compare(value)
                else:
                    self._places[value["row"]] = position, len(line)
                position += len(line)
        self.num_torn_bytes = self._file.seek(0, os.SEEK_END) - position
        if self.num_torn_bytes:
            self._file.truncate(position)
        if position == 0:
            self._write(_line({"run": self.run}))

    def _compare(self, first_line: JsonObject) -> None:
        earlier = first_line.get("run")
        if not isinstance(earlier, dict):
            raise DataError(f"{self._partial}: is not a partial output", hint="choose another output name")
        if earlier != _as_stored(self.run):
            raise DataError(
                f"{self._partial} is of another run: {_difference(earlier, self.run)}",
                hint="repeat the command that started it, or remove the file to start anew",
            )

    def _write(self, data: bytes) -> None:
        """All of the data or an error; a partial line that an error leaves is cut off by the next start."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        os.fsync(self._file.fileno())


def _line(value: JsonObject) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _parsed(line: bytes) -> JsonObject | None:
    """The object of a whole line, or None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _as_stored(run: Mapping[str, object]) -> object:
    return json.loads(json.dumps(run))


def _difference(earlier: Mapping[str, object], run: Mapping[str, object]) -> str:
    """The first settings that differ, for a message: ``temperature was 1.0, is 0.5``."""
    before, now = _flat(earlier), _flat(run)
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in differing[:3])


def _flat(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            found |= _flat(entry, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = list(entry) if isinstance(entry, tuple) else entry
    return found
