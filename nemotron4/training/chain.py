"""Stages one after the other: SFT, then DPO, then rounds of RPO, each starting from the one before.

A chain is a recipe file whose ``stage`` is an array of tables. What is outside them holds for every
stage; ``model.start = "previous"`` (the default) is the last stage's model that is not a reward model. As the
``model`` of a reward and the ``start`` of a critic "previous" is the last reward model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemotron4 import config
from nemotron4.errors import ConfigError
from nemotron4.training import recipe as recipes
from nemotron4.training import stage
from nemotron4.training.recipe import Recipe

PREVIOUS = "previous"


def load(path: Path, overrides: Sequence[str] = ()) -> list[Recipe]:
    """The recipe or recipes of a file; stage i is overridden by ``stage.i.name=value``, i from 0."""
    values, _ = config.read(path)
    if not isinstance(values.get("stage"), list):
        return [recipes.load(path, overrides)]
    recipes.override(values, overrides)
    try:
        return list(_stages(values))
    except ConfigError as error:
        raise error.within(str(path)) from error


def _stages(values: dict[str, Any]) -> Iterator[Recipe]:
    tables = values.pop("stage")
    if not tables:
        raise ConfigError("stage is an empty list; expected [[stage]] tables")
    for place, table in enumerate((values, *tables)):
        named = {"stage": table} if place else {}
        named |= {name: table[name] for name in ("run", "model") if isinstance(table, dict) and name in table}
        for name, value in named.items():
            if not isinstance(value, dict):
                raise ConfigError(f"{name} is {value!r}; expected a table [{name}]")
    folder = values.get("run", {}).get("directory")
    if not isinstance(folder, str):
        raise ConfigError("a chain needs run.directory outside its stages; each stage gets a folder in it")
    start: str | None = values.get("model", {}).get("start")
    reward_model: str | None = None
    names: set[str] = set()
    for place, table in enumerate(tables):
        table = dict(table)
        name = table.pop("name", None)
        if not isinstance(name, str) or name in names:
            raise ConfigError(f"stage {place} has name {name!r}; expected a text that no other stage has")
        if "kind" not in table:
            raise ConfigError(f"stage {name!r} has no kind; expected one of {', '.join(stage.names())}")
        names.add(name)
        merged = _merged(values, {**table, "stage": table.get("kind")})
        merged.pop("kind", None)
        merged["run"]["directory"] = str(Path(folder) / f"{place:02d}-{name}")
        own = table.get("model", {}).get("start", PREVIOUS)
        merged.setdefault("model", {})["start"] = start if own == PREVIOUS else own
        if own == PREVIOUS and place:
            merged["model"].pop("adapter", None)  # it is in the weights of the stage before
        try:
            _name_reward_model(merged, reward_model)
            recipe = recipes.build(merged)
        except ConfigError as error:
            raise error.within(f"stage {name!r}") from error
        yield recipe
        if recipe.kind.has_reward_head:
            reward_model = str(recipe.output_folder)
        else:
            is_merged = recipe.adapter is None or recipe.adapter.kind == "lora"
            if not is_merged and place + 1 < len(tables):
                assert recipe.adapter is not None
                raise ConfigError(
                    f"stage {name!r} trains an adapter of kind {recipe.adapter.kind}, which is not linear in "
                    "the weights, so the next stage cannot start from it",
                    hint="train that stage with kind lora, or without [adapter]",
                )
            start = str(recipe.output_folder)


def _name_reward_model(values: dict[str, Any], reward_model: str | None) -> None:
    """Put the last reward stage's model where a stage's own table says "previous"."""
    kind = stage.find(str(values["stage"]))
    if isinstance(values.get(kind.table), dict):
        values[kind.table] = kind.named(values[kind.table], reward_model)


def _merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Tables joined key by key, the stage's own value first."""
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in common.items()}
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
