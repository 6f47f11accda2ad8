"""What the sub-commands share: groups, questions to a person, JSON on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from nemotron4.cli.commands import HELP_NAMES
from nemotron4.errors import DataError, Nemotron4Error, unknown_name

if TYPE_CHECKING:
    from nemotron4.annotation.app import ItemSource
    from nemotron4.annotation.export import Export
    from nemotron4.client import ChatModel
    from nemotron4.engine import ModelInfo
    from nemotron4.records import JsonObject
    from nemotron4.report import Block

Finished = TypeVar("Finished")


def group(help_text: str) -> typer.Typer:
    """A sub-command with sub-commands of its own; its help is plain text like every other."""
    return typer.Typer(
        help=help_text,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": list(HELP_NAMES)},
    )


def print_json(value: Any) -> None:
    """One JSON object on one line of stdout: what ``--json`` asks for."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def present(value: JsonObject, blocks: Sequence[Block], *, as_json: bool) -> None:
    """A result: one JSON object, or a report for a person."""
    from nemotron4.report import print_report

    if as_json:
        print_json(value)
    else:
        print_report(blocks)


def run_closing(work: Coroutine[Any, Any, Finished], *models: ChatModel) -> Finished:
    """Run until it is done or stopped; the models are closed then."""
    from nemotron4.runs import run_stoppable

    async def run() -> Finished:
        try:
            return await work
        finally:
            for model in models:
                await model.close()

    return run_stoppable(run())


def note(text: str = "") -> None:
    """A line for the person at the terminal; never part of the data."""
    print(text, file=sys.stderr, flush=True)


def show_notes(info: ModelInfo) -> None:
    """What the reader of a checkpoint had to assume."""
    for text in info.notes:
        note(f"note: {info.name}: {text}")


ReadLine = Callable[[str], str]  # takes the prompt; raises EOFError at the end of input


def read_line(prompt: str) -> str:
    """A line of standard input, with line editing on a terminal. The prompt is no data: it goes to stderr."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() line editing and history

        return input(prompt)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not UTF-8 text: {error.reason}", hint="convert it first"
        ) from error
    if not line:
        raise EOFError
    return line.rstrip("\n")


def ask(question: str, read: ReadLine = read_line) -> str:
    """Any line, stripped."""
    return _read(question, read)


def ask_word(
    question: str, known: Mapping[str, str], *, default: str | None = None, read: ReadLine = read_line
) -> str:
    """One of the known words, or its number in the list that is shown first."""
    names = list(known)
    note(question)
    for number, (name, meaning) in enumerate(known.items(), start=1):
        note(f"  {number:>2} {name:<18}{meaning}")
    while True:
        given = _read(f"{question} [{default}]" if default else question, read) or (default or "")
        if given in known:
            return given
        if given.isascii() and given.isdigit() and 1 <= int(given) <= len(names):
            return names[int(given) - 1]
        message, hint = unknown_name("word", given, names)
        _refuse(Nemotron4Error(message, hint=hint))


def ask_number(question: str, scale: Sequence[int], *, read: ReadLine = read_line) -> int:
    """A number of the scale."""
    low, high = min(scale), max(scale)
    while True:
        given = _read(f"{question} ({low}-{high})", read)
        if given.isascii() and given.isdigit() and int(given) in scale:
            return int(given)
        _refuse(Nemotron4Error(f"{given!r} is not a number from {low} to {high}"))


def _read(question: str, read: ReadLine) -> str:
    try:
        return read(f"{question}: ").strip()
    except EOFError:
        raise Nemotron4Error(
            f"the input ended before an answer to {question!r}", hint="what was answered before is kept"
        ) from None


def _refuse(error: Nemotron4Error) -> None:
    note(f"error: {error}")
    if not sys.stdin.isatty():  # a pipe will not think again
        raise error


PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")]
PAGE_PORT = 8720


def serve_page(source: ItemSource, port: int) -> None:
    """Serve the page on this machine until Ctrl-C; its address holds a token."""
    import uvicorn

    from nemotron4.annotation.app import create_app
    from nemotron4.server.run import bind

    page = create_app(source)
    listener = bind("127.0.0.1", port)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/{source.store.token()}/"
    note(f"{source.title}: {address}  (Ctrl-C ends)")
    settings = uvicorn.Config(page, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    uvicorn.Server(settings).run(sockets=[listener])


def write_export(found: Export, form: str, out: Path, *, as_json: bool) -> None:
    """The rows into a file, and what was left out, in words or as one object."""
    from nemotron4 import records

    records.write(out, found.rows)
    if as_json:
        print_json({"form": form, "rows": len(found.rows), "left_out": found.left_out, "file": str(out)})
        return
    reasons = "".join(f"; {number} items left out: {reason}" for reason, number in found.left_out.items())
    note(f"wrote {len(found.rows)} rows to {out}{reasons}")
