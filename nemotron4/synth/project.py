"""A run's folder: the resolved recipe, the ledger, and opening both again."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron4 import __version__, config
from nemotron4.client import ChatModel
from nemotron4.errors import DataError
from nemotron4.records import JsonObject
from nemotron4.synth.endpoint import Endpoint, connect
from nemotron4.synth.graph import Stage, build_graph
from nemotron4.synth.prompts import PromptBook, load_prompts
from nemotron4.synth.recipe import Recipe
from nemotron4.synth.stages import KINDS

LEDGER = "ledger.sqlite"
RECIPE = "recipe.json"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A recipe with everything made that a runner needs."""

    recipe: Recipe
    stages: tuple[Stage, ...]
    models: Mapping[str, ChatModel]
    prompts: PromptBook

    async def close(self) -> None:
        for model in self.models.values():
            await model.close()


def prepare(recipe: Recipe, models: Mapping[str, ChatModel] | None = None) -> Prepared:
    """Check the recipe's graph and make its chat models; ``models`` replaces some of them."""
    prompts = load_prompts(recipe.prompts)
    made = {
        name: (models or {}).get(name) or connect(name, endpoint)
        for name, endpoint in recipe.endpoint.items()
    }
    identities = {
        name: Endpoint(name, endpoint, made[name], recipe.retry).identity
        for name, endpoint in recipe.endpoint.items()
    }
    return Prepared(recipe, build_graph(recipe, KINDS, prompts, identities), made, prompts)


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
