"""Long runs over rows: whatever interrupts one, the same command continues it.

``write_file``, ``write_json``   a file that is replaced whole, or not at all; ``publish`` for a folder
``claim``, ``held``              a folder that belongs to one run, and to one process at a time
``RowLog``                       rows that are on the disk before they are reported as done
``in_flight``                    many rows at a time, with a bound
``run_stoppable``                SIGTERM and Ctrl-C end it cleanly
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

from nemotron4.errors import ConfigError, DataError, Nemotron4Error, TerminatedError

RUN_FILE = "run.json"
SHOWN_DIFFERENCES = 3

Row = dict[str, Any]
Item = TypeVar("Item")
Finished = TypeVar("Finished")


class IncompleteError(Nemotron4Error):
    """Some rows failed in a way that may pass; the same command goes on where this one stopped."""


# Files


def flush(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Give a whole file or folder its name: all of it on the disk first, then one rename."""
    for path in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
        flush(path)
    partial.replace(final)
    flush(final.parent)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A stream for the new content of ``path``: on the disk under its name when the block ends, else gone."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as stream:
            yield stream
        publish(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _name(error, path, partial)
        raise


def _name(error: BaseException, path: Path, partial: Path | None = None) -> None:
    """A full disk does not say which file it was about, and nobody knows ours by its name for a time."""
    if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(partial)):
        error.filename = str(path)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a whole file. A kill or a full disk leaves the file that was there before."""
    with replacing(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = 1) -> None:
    write_file(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


# Settings and folders


def differences(
    earlier: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """``sampling.seed was 0, is 7`` for each setting that differs. One that is absent has its default."""
    before, after, absent = _flat(earlier), _flat(now), _flat(defaults or {})
    found = []
    for name in {**before, **after}:
        old, new = before.get(name, absent.get(name)), after.get(name, absent.get(name))
        if old != new:
            found.append(f"{name} was {old!r}, is {new!r}")
    return found


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, each as JSON keeps it."""
    found: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            found |= _flat(entry, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.loads(json.dumps(entry))
    return found


def _refuse_another_run(
    where: Path, earlier: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    found = differences(earlier, now, defaults)
    if found:
        more = len(found) - SHOWN_DIFFERENCES
        shown = "; ".join(found[:SHOWN_DIFFERENCES]) + (f"; {more} more" if more > 0 else "")
        raise ConfigError(
            f"{where} is of another run: {shown}",
            hint="repeat the earlier command to continue it, or give another place for the output",
        )


def claim(folder: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Make the folder a run with these settings (``run.json``), or check that it already is one.

    ``defaults`` are the values of settings that an earlier version did not record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RUN_FILE
    if not path.exists():
        write_json(path, settings)
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    _refuse_another_run(folder, earlier, settings, defaults)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder for this process alone; ConfigError if another one works on it. A kill frees it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        _lock(lock.fileno(), folder)
        yield


def _lock(descriptor: int, where: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(
            f"{where} is in use", hint="another process works on this run; wait for it"
        ) from error


# Rows


class RowLog:
    """An append-only file of JSON lines, for one process at a time. What ``append`` returned from survives.

    A last line that a kill cut short is dropped when the file is opened. Of rows with equal keys the last
    one counts. With ``settings`` the first line says what the run is made of, and another run is refused.
    """

    def __init__(
        self,
        path: Path,
        *,
        key: Callable[[Row], Hashable] = itemgetter("id"),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.num_torn_bytes = 0
        self._key = key
        self._settings = settings
        self._places: dict[Hashable, tuple[int, int]] = {}  # key -> offset and length of the line
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            _lock(self._file.fileno(), path)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._places

    @property
    def keys(self) -> frozenset[Hashable]:
        return frozenset(self._places)

    @property
    def rows(self) -> Iterator[Row]:
        """The rows in the order of the file."""
        return (self[key] for key in self._places)

    def __getitem__(self, key: Hashable) -> Row:
        offset, length = self._places[key]
        row: Row = json.loads(os.pread(self._file.fileno(), length, offset))
        return row

    def append(self, *rows: Row) -> None:
        """The rows are on the disk when this returns, or none of them is in the file."""
        end = self._file.seek(0, os.SEEK_END)
        lines = [_line(row) for row in rows]
        self._write(b"".join(lines))
        for row, line in zip(rows, lines, strict=True):
            self._places[self._key(row)] = end, len(line)
            end += len(line)

    def close(self) -> None:
        self._file.close()

    def _read(self) -> None:
        position = 0
        self._file.seek(0)
        with os.fdopen(os.dup(self._file.fileno()), "rb") as lines:
            for number, line in enumerate(lines):
                row = _parsed(line)
                if row is None:
                    break
                if number == 0 and self._settings is not None:
                    self._compare(row)
                else:
                    self._places[self._key_of(row, number + 1)] = position, len(line)
                position += len(line)
        self.num_torn_bytes = self._file.seek(0, os.SEEK_END) - position
        if self.num_torn_bytes:
            self._file.truncate(position)
        if position == 0:
            if self._settings is not None:
                self._write(_line({"run": dict(self._settings)}))
            flush(self.path.parent)

    def _key_of(self, row: Row, number: int) -> Hashable:
        try:
            return self._key(row)
        except KeyError as error:
            raise DataError(f"{self.path}:{number}: the row has no field {error}") from error

    def _compare(self, first: Row) -> None:
        earlier = first.get("run", first.get("settings"))  # the second in conversions of earlier versions
        if not isinstance(earlier, dict):
            raise DataError(f"{self.path}: is not a partial output", hint="choose another output name")
        _refuse_another_run(self.path, earlier, self._settings or {})

    def _write(self, data: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except BaseException as error:
            self._file.truncate(end)  # a torn line in the middle would hide every later one
            _name(error, self.path)
            raise


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a log that another process may be writing; none if there is no file."""
    found = []
    if path.exists():
        with path.open("rb") as lines:
            for line in lines:
                if (row := _parsed(line)) is None:
                    break
                found.append(row)
    return found


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _parsed(line: bytes) -> Row | None:
    """The object of a whole line, or None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# Work


async def in_flight(
    items: Iterable[Item],
    work: Callable[[Item], Awaitable[Finished]],
    keep: Callable[[list[Finished]], None],
    *,
    limit: int,
    is_ordered: bool = False,
) -> None:
    """Work on every item, at most ``limit`` at a time; finished ones are kept in groups as they come.

    ``keep`` is called in a thread, because it waits for the disk; with ``is_ordered`` in the items' order.
    If work on an item raises, or the task is cancelled, what is finished is kept, the rest is cancelled.
    """
    todo, wake = iter(items), asyncio.Event()
    under_way: dict[asyncio.Future[Finished], None] = {}
    done: list[asyncio.Future[Finished]] = []
    unkept: list[Finished] = []

    def on_done(future: asyncio.Future[Finished]) -> None:
        done.append(future)
        wake.set()

    def take_finished() -> None:
        ready = itertools.takewhile(asyncio.Future.done, list(under_way)) if is_ordered else done[:]
        done.clear()
        for future in ready:
            del under_way[future]
            unkept.append(future.result())

    try:
        while True:
            for item in itertools.islice(todo, limit - len(under_way)):
                task = asyncio.ensure_future(work(item))
                task.add_done_callback(on_done)
                under_way[task] = None
            if unkept:
                group = unkept[:]
                unkept.clear()
                await _in_thread(keep, group)
            elif not under_way:
                return
            else:
                await wake.wait()
            wake.clear()
            take_finished()
    finally:
        for future in under_way:
            future.cancel()
        results = await asyncio.gather(*under_way, return_exceptions=True)
        if not is_ordered:
            unkept += [result for result in results if not isinstance(result, BaseException)]
        if unkept:
            keep(unkept)


async def _in_thread(keep: Callable[[list[Finished]], None], group: list[Finished]) -> None:
    """Waits for the end even when cancelled: nothing else may write to the same log meanwhile."""
    keeping = asyncio.ensure_future(asyncio.to_thread(keep, group))
    try:
        await asyncio.shield(keeping)
    except asyncio.CancelledError:
        await keeping
        raise


def run_stoppable(main: Coroutine[Any, Any, Finished]) -> Finished:
    """``asyncio.run``; SIGTERM cancels it as Ctrl-C does, and then ends it with TerminatedError."""
    is_terminated = False

    async def stoppable() -> Finished:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()

        def stop() -> None:
            nonlocal is_terminated
            is_terminated = True
            loop.remove_signal_handler(signal.SIGTERM)  # a second one ends the process at once
            assert task is not None
            task.cancel()

        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: its owner decides
            loop.add_signal_handler(signal.SIGTERM, stop)
        return await main

    try:
        return asyncio.run(stoppable())
    except asyncio.CancelledError:
        if is_terminated:
            raise TerminatedError from None
        raise
