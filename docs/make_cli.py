"""Writes docs/cli.md from the `--help` of every sub-command; tests/test_docs.py compares the two."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import typer

from nemotron4.cli.commands import COMMANDS, load_app
from nemotron4.cli.main import help_text, main

PAGE = Path(__file__).with_name("cli.md")


def page() -> str:
    """The whole page."""
    sections = ["# Command line", "Written by `docs/make_cli.py`; do not edit.", _block(help_text())]
    for name in COMMANDS:
        for path in command_paths(name):
            sections += [f"{'#' * (len(path) + 1)} nemotron4 {' '.join(path)}", _block(_help(path))]
    return "\n\n".join(sections) + "\n"


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
    return printed.getvalue()


def _block(text: str) -> str:
    return f"```\n{text.strip()}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
