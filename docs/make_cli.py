"""Writes docs/cli.md from the parameters of every sub-command; tests/test_docs.py compares the two.

A value shows its default in place, required options are in the heading, and what several commands say in the
same words is on the page once, at its end.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import typer

from nemotron4.cli.commands import COMMANDS, load_app

PAGE = Path(__file__).with_name("cli.md")
SHARED = "[Shared](#shared-options)"
NUM_SHARED = 2  # commands that describe an option in the same words, from which it is described once
WIDTH = 110
MAX_LEFT = 36
PLACEHOLDERS = {str: "TEXT", int: "N", float: "X", Path: "PATH", bool: ""}
INTRODUCTION = """\
Written by `docs/make_cli.py`; do not edit. A heading has what a command needs. `--port 1424`: the default is
1424; in capitals: no default. `nemotron4 COMMAND --help` says more. `source <(nemotron4 completion bash)`
completes commands and options (zsh too; `nemotron4 completion fish | source`)."""
GUIDES = {
    "pull": "checkpoints.md",
    "models": "checkpoints.md",
    "serve": "serving.md",
    "chat": "generate.md#nemotron4-chat",
    "generate": "generate.md",
    "plan": "plan.md",
    "convert": "convert.md",
    "train": "training.md",
    "recipe": "recipes.md",
    "card": "evaluation.md#a-card-for-a-model",
    "data": "pretraining.md",
    "doctor": "training.md#data",
    "synth": "synthesis.md",
    "eval": "evaluation.md",
    "redteam": "redteam.md",
    "launch": "cluster.md",
}


class Entry(NamedTuple):
    """An argument or option of one command."""

    name: str
    value: str  # its default, or what to put there; an argument has none
    meaning: str
    is_needed: bool = False
    has_default: bool = False

    @property
    def words(self) -> str:
        """``--port 1424``"""
        return f"{self.name} {self.value}".strip()


def page() -> str:
    """The whole page."""
    commands = [found for name in COMMANDS for found in _commands(name)]
    entries = {path: [_entry(each) for each in command.params] for path, command in commands}
    shared = _shared([entry for each in entries.values() for entry in each])
    sections = ["# Command line", INTRODUCTION]
    for path, command in commands:
        needed = [entry.words.split(", ")[-1] for entry in entries[path] if entry.is_needed]
        sections.append(" ".join([f"{'#' * (len(path) + 1)} nemotron4", *path, *needed]))
        sections += _body(_purpose(path, command), entries[path], shared)
    meanings = sorted(shared.values(), key=lambda entry: entry.name.lower())
    return "\n\n".join([*sections, "## Shared options", _block(_table(meanings))]) + "\n"


def command_paths(name: str) -> Iterator[tuple[str, ...]]:
    """The sub-command, and below a group each of its own."""
    yield from (path for path, _ in _commands(name))


def _commands(name: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield from _walk((name,), typer.main.get_command(load_app(name, COMMANDS[name])))


def _walk(path: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk((*path, name), inner)


def _entry(parameter: Any) -> Entry:
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
        return Entry(name, "", parameter.help or "", parameter.required)
    names = ", ".join(
        sorted([*parameter.opts, *parameter.secondary_opts], key=lambda each: each.startswith("--"))
    )
    if parameter.is_flag:
        return Entry(names, "", parameter.help or "")
    value, has_default = _value(parameter)
    return Entry(names, value, parameter.help or "", parameter.required, has_default)


def _value(parameter: Any) -> tuple[str, bool]:
    """What belongs behind an option (its default, choices, or a word), and whether it has a default."""
    kind, default = parameter.type_descriptor.annotation, parameter.default
    if get_origin(kind) is Literal:
        choices = sorted(map(str, get_args(kind)), key=lambda each: each != default)
        return "|".join(choices), default is not None
    if default is not None:
        return f"{default:g}" if isinstance(default, float) else str(default), True
    [kind] = get_args(kind) or [kind]
    return parameter.metavar or PLACEHOLDERS[kind], False


def _shared(entries: list[Entry]) -> dict[str, Entry]:
    """What several commands say of a name in the same words; of two such meanings the more frequent one."""
    uses = Counter((entry.name, entry.meaning) for entry in entries)
    often = dict(reversed([each for each, number in uses.most_common() if number >= NUM_SHARED]))
    values = {(entry.name, entry.meaning): entry.value for entry in entries if not entry.has_default}
    return {name: Entry(name, values.get((name, meaning), ""), meaning) for name, meaning in often.items()}


def _purpose(path: tuple[str, ...], command: Any) -> str:
    """The first paragraph of the help, and the guide of a sub-command."""
    purpose = " ".join(command.help.split("\n\n")[0].split())
    is_guided = len(path) == 1 and path[0] in GUIDES
    return f"{purpose} [Guide]({GUIDES[path[0]]})." if is_guided else purpose


def _body(purpose: str, entries: list[Entry], shared: dict[str, Entry]) -> Iterator[str]:
    """What a command is for, its own options, and the names of the others; its heading has those it needs."""
    yield purpose
    is_shared = [entry.name in shared and shared[entry.name].meaning == entry.meaning for entry in entries]
    if own := [entry for entry, elsewhere in zip(entries, is_shared, strict=True) if not elsewhere]:
        yield _block(_table(own))
    others = [e for e, elsewhere in zip(entries, is_shared, strict=True) if elsewhere and not e.is_needed]
    if names := [f"`{entry.words if entry.has_default else entry.name}`" for entry in others]:
        yield f"{SHARED}: {', '.join(names)}."


def _table(entries: list[Entry]) -> str:
    """Options and meanings in two columns."""
    left = min(MAX_LEFT, max(len(entry.words) for entry in entries)) + 2
    lines: list[str] = []
    for entry in entries:
        first, *more = textwrap.wrap(entry.meaning, WIDTH - left)
        is_wide = len(entry.words) + 2 > left
        lines += [entry.words, " " * left + first] if is_wide else [f"{entry.words:<{left}}{first}"]
        lines += [" " * left + each for each in more]
    return "\n".join(lines)


def _block(text: str) -> str:
    return f"```\n{text.strip()}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
