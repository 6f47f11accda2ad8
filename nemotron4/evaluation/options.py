"""A benchmark with other settings: another definition, whose name says what was changed."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from nemotron4.errors import ConfigError, unknown
from nemotron4.evaluation.data import DataSource
from nemotron4.evaluation.task import Item, JudgeRequest, Task
from nemotron4.records import Message

VERDICT = "verdict"  # text: what the judge writes is read; choice: it can write a verdict alone


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
        changed |= {name: value for name, value in values.items() if value != settable(task)[name]}
        verdict = values.pop(VERDICT, "text") if task.verdicts else "text"
        if values:
            assert task.with_options is not None, "a task with options can be made with others"
            task = task.with_options({**task.options, **values})
        if verdict not in ("text", "choice"):
            raise ConfigError(f"{task.name}: {VERDICT} is {verdict!r}; expected text or choice")
        task = _held(task) if verdict == "choice" else task
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


def settable(task: Task) -> dict[str, Any]:
    """What ``--set`` may change, with its values."""
    return {**task.options, **({VERDICT: "text"} if task.verdicts else {})}


def _held(task: Task) -> Task:
    """The judge can say a verdict and nothing else, so that there is always one."""
    ask = task.judge
    assert ask is not None, "only a judge has verdicts"

    def judge(
        items: Sequence[Item], responses: Mapping[str, Sequence[str]], source: DataSource
    ) -> list[JudgeRequest]:
        asked = ask(items, responses, source)
        return [replace(each, sampling=replace(each.sampling, choice=task.verdicts)) for each in asked]

    return replace(task, judge=judge)


def _parsed(task: Task, settings: Sequence[str]) -> dict[str, Any]:
    """Values by name, of the types that the task's own have."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise ConfigError(f"setting {setting!r} has no '='", hint="write it as name=value")
        known = settable(task)
        if name not in known:
            if not known:
                raise ConfigError(f"{task.name} has nothing that can be set; given {name!r}")
            raise unknown(f"setting of {task.name}", name, known)
        expected = type(known[name])
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
