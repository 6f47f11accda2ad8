"""A recipe of stages before it runs: its command lines are parsed, what stages read and make is listed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from nemotron4.cli.commands import COMMANDS, load_app
from nemotron4.cli.console import print_json
from nemotron4.errors import ConfigError
from nemotron4.progress import duration
from nemotron4.recipe import CommandStage, Places, StagedRecipe, unknown
from nemotron4.records import JsonObject
from nemotron4.report import Table, print_report


def show_dry_run(recipe: StagedRecipe, places: Places, *, as_json: bool) -> None:
    """Check every stage, then print them as one table."""
    rows = [_checked(stage, places) for stage in recipe.stage]
    if as_json:
        print_json({"recipe": recipe.name, "stages": rows})
        return
    cells = [
        [
            str(row["stage"]),
            "; ".join(row["commands"]),
            ", ".join(row["reads"]),
            "" if row["minutes"] is None else duration(60 * row["minutes"]),
        ]
        for row in rows
    ]
    print_report([Table(["stage", "commands", "reads", "expected"], cells, f"{recipe.name}: stages")])


def _checked(stage: CommandStage, places: Places) -> JsonObject:
    reads = places.inputs(stage)
    for command in (*stage.commands, *([stage.serve] if stage.serve else [])):
        words = places.command(command, stage)
        try:
            if words[0] == "nemotron4":
                parse(words[1:])
            elif not Path(words[1]).is_file():
                raise ConfigError(f"there is no file {words[1]}")
        except ConfigError as error:
            raise ConfigError(
                f"stage {stage.name}: {' '.join(words)!r}: {error.message}", hint=error.hint
            ) from error
    return {
        "stage": stage.name,
        "commands": [" ".join(_named(command)) for command in stage.commands],
        "reads": [places.fill(text, stage) for text in reads],
        "makes": [places.fill(text, stage) for text in stage.makes],
        "minutes": stage.minutes or None,
    }


def _named(command: Sequence[str]) -> list[str]:
    """``train sft.toml`` of a whole command line."""
    return [word.rpartition("/")[2] for word in command[1:4] if not word.startswith("-") and "=" not in word]


def parse(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command (``synth run``) and the values of its parameters; ConfigError if the parser refuses it."""
    name, *rest = words
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    parser: Any = typer.main.get_command(load_app(name, COMMANDS[name]))
    path = f"nemotron4 {name}"
    while hasattr(parser, "commands"):
        inner, *rest = rest or [""]
        if inner not in parser.commands:
            raise unknown(f"command of {path}", inner, parser.commands)
        parser, path = parser.commands[inner], f"{path} {inner}"
    try:
        context = parser.make_context(path, rest)
    except typer.TyperException as error:
        raise ConfigError(str(getattr(error, "message", error)), hint=f"see `{path} --help`") from error
    return path.removeprefix("nemotron4 "), context.params
