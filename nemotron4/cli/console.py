"""What the sub-commands share: groups, JSON on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

from nemotron4.cli.commands import HELP_NAMES

if TYPE_CHECKING:
    from nemotron4.engine import ModelInfo


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


def note(text: str = "") -> None:
    """A line for the person at the terminal; never part of the data."""
    print(text, file=sys.stderr, flush=True)


def show_notes(info: ModelInfo) -> None:
    """What the reader of a checkpoint had to assume."""
    for text in info.notes:
        note(f"note: {info.name}: {text}")
