"""Questions to a person at the terminal, or to a pipe: one line in for each, asked again until valid."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from nemotron4.cli.console import note
from nemotron4.errors import Nemotron4Error, unknown_name

ReadLine = Callable[[str], str]  # takes the prompt; raises EOFError at the end of input


def read_line(prompt: str) -> str:
    """A line of standard input, with line editing on a terminal. The prompt is no data: it goes to stderr."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives input() line editing and history

        return input(prompt)
    line = sys.stdin.readline()
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
        if given.isdigit() and 1 <= int(given) <= len(names):
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
