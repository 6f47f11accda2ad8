"""A run's folder: where the ledger and the resolved recipe stand. Reading a run needs no more than this."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from nemotron4 import __version__, config
from nemotron4.errors import DataError
from nemotron4.records import JsonObject
from nemotron4.synth.recipe import Recipe

LEDGER = "ledger.sqlite"
RECIPE = "recipe.json"


def save_recipe(folder: Path, recipe: Recipe) -> None:
    """The resolved recipe, the program's version and commit, beside the data they made."""
    folder.mkdir(parents=True, exist_ok=True)
    value = {"version": __version__, "commit": _commit(), "recipe": _plain(dataclasses.asdict(recipe))}
    partial = folder / f".{RECIPE}.partial-{os.getpid()}"
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / RECIPE)


def load_saved_recipe(folder: Path) -> Recipe:
    """The recipe of an existing run."""
    path = folder / RECIPE
    try:
        value: JsonObject = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}", hint="name the folder given to `synth run --out`"
        ) from error
    return config.build(Recipe, _without_none(value["recipe"]))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _commit() -> str | None:
    """The commit of the program's own checkout, if it runs from one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
