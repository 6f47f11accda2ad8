"""A commented recipe to begin with: what must be set is set, the other settings are there as comments."""

from __future__ import annotations

import dataclasses
import inspect
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron4.errors import ConfigError, unknown_name
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.runs import write_file
from nemotron4.training import recipe as recipes
from nemotron4.training import stage
from nemotron4.training.recipe import (
    BatchSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    SamplesSection,
)

WIDTH = 110


def new_recipe(path: Path, kind: str, overrides: Sequence[str]) -> None:
    """Write a recipe of a kind (a stage, or one of its examples) with the settings given as NAME=VALUE."""
    if path.exists():
        raise ConfigError(f"{path} exists already", hint="name a new file")
    examples = {name: (each, table) for each in stage.all_stages() for name, table in each.examples.items()}
    if kind not in examples:
        message, hint = unknown_name("kind of recipe", kind, examples)
        raise ConfigError(message, hint=hint)
    chosen, table = examples[kind]
    values: dict[str, Any] = {
        "stage": chosen.name,
        "model": {"start": "smollm2"},
        "data": {"train": ["rows.jsonl"]},
        "optimizer": {"learning_rate": 1e-5},
        "run": {"directory": f"runs/{path.stem}", "epochs": 1},
    }
    if chosen.section is not None:
        values[chosen.table] = dict(table)
    recipes.override(values, overrides)
    recipes.build(values)
    sections: list[tuple[str, type | None]] = [
        ("model", ModelSection), ("data", DataSection), (chosen.table, chosen.section),
        ("optimizer", OptimizerSection), ("batch", BatchSection), ("run", RunSection),
        ("adapter", AdapterConfig), ("samples", SamplesSection), ("parallel", ParallelSection),
    ]  # fmt: skip
    rows = ", ".join(each.name for each in chosen.kinds)
    lines = [
        f"# nemotron4 train {path}",
        f"# Rows: {rows}; docs/training.md has their forms, and nemotron4 doctor data looks at yours.",
        f"stage = {_toml(values['stage'])}",
    ]
    for name, section in sections:
        if section is not None:
            lines += ["", *_section(name, section, values.get(name))]
    text = "\n".join(lines) + "\n"
    tomllib.loads(text)
    write_file(path, text)


def _section(name: str, section: type, given: dict[str, Any] | None) -> list[str]:
    """A table with its purpose, what is given, and the other settings as comments."""
    purpose = " ".join((inspect.getdoc(section) or "").split("\n\n")[0].split())
    lines = [f"# {purpose}", f"[{name}]" if given is not None else f"# [{name}]"]
    for field in dataclasses.fields(section):
        if given is not None and field.name in given:
            lines.append(f"{field.name} = {_toml(given[field.name])}")
        elif field.default is not dataclasses.MISSING and field.default is not None:
            lines.append(f"# {field.name} = {_toml(field.default)}")
        elif field.default_factory is dataclasses.MISSING:
            lines.append(f"# {field.name} =")
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(entry)}" for name, entry in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
