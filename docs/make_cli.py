"""Writes docs/cli.md from the `--help` of every sub-command; tests/test_docs.py compares the two.

What several commands say in the same words is on the page once, at its end.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import typer

from nemotron4.cli.commands import COMMANDS, load_app
from nemotron4.cli.main import help_text, main

PAGE = Path(__file__).with_name("cli.md")
SHARED = "[Shared](#shared-options)"
NUM_SHARED = 3  # commands that describe an option in the same words, from which it is described once


def page() -> str:
    """The whole page."""
    helps = {path: _help(path) for name in COMMANDS for path in command_paths(name)}
    entries = Counter(entry for text in helps.values() for entry in set(_entries(text)))
    often = [entry for entry, number in entries.items() if number >= NUM_SHARED]
    meanings = Counter(names.split()[0] for names, _ in often)
    shared = {entry for entry in often if meanings[entry[0].split()[0]] == 1}
    sections = ["# Command line", "Written by `docs/make_cli.py`; do not edit.", _block(help_text())]
    for path, text in helps.items():
        sections += [f"{'#' * (len(path) + 1)} {_usage(text)}", *_own(text, shared)]
    lines = [f"  {names}  {meaning}" for names, meaning in sorted(shared, key=lambda entry: entry[0].lower())]
    return "\n\n".join([*sections, "## Shared options", _block("\n".join(lines), is_indented=True)]) + "\n"


def command_paths(name: str) -> Iterator[tuple[str, ...]]:
    """The sub-command, and below a group each of its own."""
    yield from _walk((name,), typer.main.get_command(load_app(name, COMMANDS[name])))


def _walk(path: tuple[str, ...], command: object) -> Iterator[tuple[str, ...]]:
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk((*path, name), inner)


def _help(path: tuple[str, ...]) -> str:
    printed = io.StringIO()
    earlier = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "80"  # the same page in any terminal
    try:
        with contextlib.redirect_stdout(printed):
            main([*path, "--help"])
    finally:
        os.environ.pop("COLUMNS") if earlier is None else os.environ.update(COLUMNS=earlier)
    # A range is told behind the meaning, and the usage tells which arguments are required.
    text = re.sub(
        r"<(int|float) range>", lambda found: f"<{found[1]}>".ljust(len(found[0])), printed.getvalue()
    )
    arguments = re.search(r"^Arguments:\n.*?(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    if arguments is not None:
        text = text.replace(arguments[0], re.sub(r"\s+\[required\]", "", arguments[0]))
    return "\n".join(line.rstrip() for line in text.splitlines())


def _usage(text: str) -> str:
    """``nemotron4 models rm NAME``; without braces, which Markdown would take for attributes."""
    words = " ".join(_paragraphs(text)[0]).removeprefix("Usage: ").replace(" [OPTIONS]", "")
    return words.split(" COMMAND")[0].translate(str.maketrans("", "", "{}"))


def _paragraphs(text: str) -> list[list[str]]:
    return [part.splitlines() for part in text.strip().split("\n\n")]


def _rows(lines: list[str]) -> Iterator[list[str]]:
    """The lines of each option or argument below a heading."""
    row: list[str] = []
    for line in lines:
        if re.match(r"  \S", line) and row:
            yield row
            row = []
        row.append(line)
    yield row


def _entry(row: list[str]) -> tuple[str, str]:
    """Names and meaning of an option, however wide the column of its command is."""
    names, meaning = re.split(r"\s{2,}", "  ".join(line.strip() for line in row), maxsplit=1)
    return names, " ".join(meaning.split())


def _entries(text: str) -> Iterator[tuple[str, str]]:
    for lines in _paragraphs(text):
        if lines[0] in ("Arguments:", "Options:"):
            yield from map(_entry, _rows(lines[1:]))


def _own(text: str, shared: set[tuple[str, str]]) -> list[str]:
    """The help of one command without what others say too; of a group its purpose alone."""
    kept: list[str] = []
    left_out: list[str] = []
    parts = _paragraphs(text)
    if ["Commands:"] in [lines[:1] for lines in parts]:
        return [" ".join(line.strip() for line in parts[1])]
    for lines in parts[1:]:
        if lines[0] not in ("Arguments:", "Options:"):
            kept.append("\n".join(line.strip() for line in lines))
            continue
        rows = list(_rows(lines[1:]))
        own = [line for row in rows if _entry(row) not in shared for line in row]
        left_out += [_entry(row)[0] for row in rows if _entry(row) in shared]
        kept += ["\n".join([lines[0], *own])] if own else []
    names = [f"`{name.split(' ')[0].rstrip(',')}`" for name in left_out if "--help" not in name]
    return [_block("\n\n".join(kept)), *([f"{SHARED}: {', '.join(names)}."] if names else [])]


def _block(text: str, *, is_indented: bool = False) -> str:
    return f"```\n{text.rstrip() if is_indented else text.strip()}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
