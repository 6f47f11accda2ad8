"""The folder of one run: every row is on disk as soon as it is there, so a killed run loses none.

``run.json`` says what was asked of which model; a run with other settings is another run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemotron4.errors import ConfigError
from nemotron4.records import JsonObject

RUN_FILE = "run.json"


class RowLog:
    """An append-only JSON-lines file. A last line that a kill cut short is dropped when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[JsonObject] = []
        if path.exists():
            self._recover()
        self._stream = path.open("ab")

    def _recover(self) -> None:
        whole = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
            whole += len(line)
        if whole != self.path.stat().st_size:
            os.truncate(self.path, whole)

    def append(self, row: JsonObject) -> None:
        self.rows.append(row)
        self._stream.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process alone; ConfigError if another one works on it. A kill frees it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{folder} is in use", hint="another process works on this run; wait for it"
            ) from error
        yield


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder a run with these settings, or check that it already is one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN_FILE
    if not path.exists():
        partial = folder / f".{RUN_FILE}.partial"
        partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(settings))
    different = [name for name in wanted if wanted[name] != earlier.get(name)]
    if different:
        name = different[0]
        raise ConfigError(
            f"{folder} holds a run with {name} {earlier.get(name)!r}; this one has {wanted[name]!r}",
            hint="take another --out, or repeat the earlier command to resume it",
        )
