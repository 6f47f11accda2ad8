"""Functions of a recipe's author, each in a process of its own: a crash or a hang costs rows, not the run.

    python -m nemotron4.client.own_code FILE.py FUNCTION [by-name]

reads lists of rows as JSON lines and answers each with ``{"rows": [...]}`` or ``{"error": "..."}``.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import inspect
import json
import os
import symtable
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from nemotron4.client.interface import BadContentError
from nemotron4.errors import ConfigError
from nemotron4.records import JsonObject

LIMIT = 1 << 30  # bytes of one answer
BY_NAME = "by-name"


def split_name(function: str) -> tuple[Path, str]:
    """``file.py:name``."""
    file, separator, name = function.rpartition(":")
    if not separator or not file.endswith(".py") or not name.isidentifier():
        raise ConfigError(f"function is {function!r}; expected FILE.py:NAME")
    if not Path(file).is_file():
        raise ConfigError(
            f"{file}: there is no such file", hint="paths in a recipe count from the working folder"
        )
    return Path(file), name


def load_function(file: Path, name: str) -> Callable[..., Any]:
    """ConfigError for whatever the file does instead of making the function. Its prints go to stderr."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the author's: any of them is his message
        raise ConfigError(f"{file}: cannot be loaded: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{file}: there is no function {name!r}")
    if inspect.iscoroutinefunction(function):
        raise _is_async(file, name)
    return function  # type: ignore[no-any-return]


def _is_async(file: Path, name: str) -> ConfigError:
    return ConfigError(f"{file}: {name} is an async function", hint="write it as a plain def")


def needed_parameters(file: Path, name: str) -> tuple[str, ...]:
    """Names of a function's parameters without a default, from the file's text: nothing of it runs here."""
    try:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text, str(file))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as Python: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.AsyncFunctionDef) and node.name == name:
            raise _is_async(file, name)
        if isinstance(node, ast.FunctionDef) and node.name == name:
            given = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
            named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return (
                *given[: len(given) - len(node.args.defaults)],
                *(arg.arg for arg, default in named if default is None),
            )
    symbols = symtable.symtable(text, str(file), "exec").get_symbols()
    bound = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    stars = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in tree.body)
    if name not in bound and not stars:
        raise ConfigError(f"{file}: there is no function {name!r}")
    return ()  # made in another way than by def


class OwnCode:
    """One function in its process, started at the first call. Rows that wait are handed over together.

    ``by_name``: a single parameter is a field of the row as several are, not the row.
    """

    def __init__(self, function: str, *, batch_size: int, timeout_s: float, by_name: bool = False) -> None:
        self._file, self._name = split_name(function)
        self._batch_size, self._timeout_s = batch_size, timeout_s
        self._more = (BY_NAME,) if by_name else ()
        self._num_alone = 0  # of those that wait: the rows of a batch that failed
        self._waiting: list[tuple[JsonObject, asyncio.Future[Any]]] = []
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    async def call(self, row: JsonObject) -> Any:
        """What the function returns for a row; BadContentError with its message if it fails."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await future

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        await self._end()

    async def _work(self) -> None:
        while self._waiting:
            size = 1 if self._num_alone else self._batch_size
            batch, self._waiting = self._waiting[:size], self._waiting[size:]
            self._num_alone = max(0, self._num_alone - size)
            try:
                made = await asyncio.wait_for(self._ask([row for row, _ in batch]), self._timeout_s)
            except TimeoutError:  # an OSError, so before it
                await self._end()
                await self._fail(batch, f"{self._name}: no answer within {self._timeout_s:g} s")
            except BadContentError as error:
                await self._fail(batch, f"{self._name}: {error}")
            except (OSError, TypeError, ValueError) as error:  # TypeError: a row with a date
                await self._end()  # what it writes next may be about these rows
                await self._fail(batch, f"{self._name}: {error}")
            else:
                for (_, future), value in zip(batch, made, strict=True):
                    if not future.done():
                        future.set_result(value)

    async def _fail(self, batch: Sequence[tuple[JsonObject, asyncio.Future[Any]]], message: str) -> None:
        """Of several rows each is tried alone, so that one bad row costs no other."""
        if len(batch) == 1:
            if not batch[0][1].done():
                batch[0][1].set_exception(BadContentError(message, kind="python"))
            return
        self._waiting[:0] = batch
        self._num_alone = len(batch)

    async def _ask(self, rows: list[JsonObject]) -> list[Any]:
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "nemotron4.client.own_code", str(self._file), self._name,
                *self._more, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LIMIT,
            )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(rows).encode() + b"\n")
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line:
            status = await self._process.wait()
            self._process = None
            raise BadContentError(f"its process ended with status {status}", kind="python")
        answer = json.loads(line)
        if "error" in answer:
            raise BadContentError(answer["error"], kind="python")
        return list(answer["rows"])

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


def serve(function: Callable[..., Any], source: TextIO, sink: TextIO, *, by_name: bool = False) -> None:
    """Answer each list of rows; see ``called``."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = tuple(p.name for p in parameters if p.default is p.empty and p.kind not in kinds)
    for line in source:
        rows = json.loads(line)
        try:
            made = called(function, names, rows, by_name=by_name)
            if len(made) != len(rows):
                raise ValueError(f"it made {len(made)} results for {len(rows)} rows")
            answer = json.dumps({"rows": made}, allow_nan=False, ensure_ascii=False)
            answer.encode()  # half of a character pair is no text
        except Exception as error:  # the author's: any of them is his message
            where = traceback.extract_tb(error.__traceback__)[-1]
            answer = json.dumps({"error": f"{type(error).__name__}: {error} (line {where.lineno})"})
        sink.write(answer + "\n")
        sink.flush()


def called(
    function: Callable[..., Any], names: Sequence[str], rows: list[JsonObject], *, by_name: bool = False
) -> list[Any]:
    """A function of ``rows`` gets the list; one of a single other parameter, not ``by_name``, row after row.

    One of several gets fields of a row by their names; where all names have an s behind, lists of them. Of
    ``completions``, ``by_name``, see ``_of_trl``.
    """
    if by_name and "completions" in names:
        return list(function(**_of_trl(function, names, rows)))
    if len(names) < 2 and not by_name:
        return list(function(rows)) if names == ("rows",) else [function(row) for row in rows]
    if all(name.endswith("s") and name[:-1] in row for name in names for row in rows):
        return list(function(**{name: [row[name[:-1]] for row in rows] for name in names}))
    return [function(**{name: row[name] for name in names}) for row in rows]


def _of_trl(function: Callable[..., Any], names: Sequence[str], rows: list[JsonObject]) -> JsonObject:
    """What TRL gives a reward function: prompts, completions and the columns of the prompts' rows, as lists.

    All of them where it takes ``**kwargs``, else those that it names. ``answers`` and ``rows`` are ours.
    """
    given = {f"{name}s": [row[name] for row in rows] for name in ("answer", "row", "prompt", "completion")}
    columns = {name: [row["row"].get(name) for row in rows] for each in rows for name in each["row"]}
    kept = {name: given[name] for name in ("prompts", "completions")}
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return {**given, **columns, **kept}
    return {name: {**given, **columns, **kept}[name] for name in names}


def _main(file: str, name: str, more: str = "") -> None:
    # What the file prints while it is loaded, the function, or a program it starts, must not come between the
    # answers: a line too many would give every later row the answer of another.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Nor may they read rows: a program that reads its input would wait for ever, or take some.
    rows = os.fdopen(os.dup(0), encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    serve(load_function(Path(file), name), rows, answers, by_name=more == BY_NAME)


if __name__ == "__main__":
    _main(*sys.argv[1:])
