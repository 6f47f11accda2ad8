"""A benchmark with other settings: another definition, whose name says what was changed."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from nemotron4.errors import ConfigError, unknown_name
from nemotron4.evaluation.data import DataSource
from nemotron4.evaluation.task import Item, Task
from nemotron4.records import Message


class Changes(NamedTuple):
    """What is asked for; None and () leave the benchmark's own. ``settings`` are ``name=value``."""

    max_tokens: int | None = None
    temperature: float | None = None
    system: str | None = None
    num_fewshot: int | None = None
    settings: tuple[str, ...] = ()


def with_changes(task: Task, changes: Changes) -> Task:
    """The task under these settings."""
    num_fewshot, system = changes.num_fewshot, changes.system
    options = [*changes.settings, *([] if num_fewshot is None else [f"num_fewshot={num_fewshot}"])]
    changed: dict[str, Any] = {}
    if options:
        values = _parsed(task, options)
        changed |= {name: value for name, value in values.items() if value != task.options[name]}
        assert task.with_options is not None, "a task with options can be made with others"
        task = task.with_options({**task.options, **values})
    sampling = {"max_tokens": changes.max_tokens, "temperature": changes.temperature}
    asked = {name: value for name, value in sampling.items() if value is not None}
    if asked and not task.is_generative:
        raise ConfigError(
            f"{task.name} scores numbers: it writes nothing that {', '.join(asked)} could change"
        )
    different: dict[str, Any] = {n: value for n, value in asked.items() if value != getattr(task.sampling, n)}
    changed |= different
    if system is not None:
        changed["system"] = repr(system if len(system) <= 24 else system[:21] + "...")
        task = _with_system(task, system)
    return replace(task, sampling=replace(task.sampling, **different), changed={**task.changed, **changed})


def _parsed(task: Task, settings: Sequence[str]) -> dict[str, Any]:
    """Values by name, of the types that the task's own have."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ConfigError(f"setting {setting!r} has no '='", hint="write it as name=value")
        if name not in task.options:
            if not task.options:
                raise ConfigError(f"{task.name} has nothing that can be set; given {name!r}")
            message, hint = unknown_name(f"setting of {task.name}", name, task.options)
            raise ConfigError(message, hint=hint)
        expected = type(task.options[name])
        try:
            value = tomllib.loads(f"x = {text}")["x"]
        except tomllib.TOMLDecodeError:
            value = text
        if type(value) is not expected:
            raise ConfigError(f"{task.name}: {name} is {value!r}; expected {expected.__name__}")
        found[name] = value
    return found


def _with_system(task: Task, system: str) -> Task:
    """Every item opens with this system turn, in place of its own."""

    def load(source: DataSource) -> list[Item]:
        items = task.load(source)
        if any(item.is_raw or "choices" in item.fields or "rejected" in item.fields for item in items):
            raise ConfigError(f"{task.name} asks no chat model for text: it has no system turn")
        first = Message("system", system)
        return [
            replace(item, messages=(first, *(m for m in item.messages if m.role != "system")))
            for item in items
        ]

    return replace(task, load=load, prompt=f"{system}\n\n{task.prompt}")
