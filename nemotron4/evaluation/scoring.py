"""Score stored answers. A live run ends with the same call, so both give the same number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemotron4.errors import ConfigError
from nemotron4.evaluation.data import DataSource
from nemotron4.evaluation.responses import read_judgments, read_responses
from nemotron4.evaluation.result import Result, make_result, result_name
from nemotron4.evaluation.task import Inputs, Item, Judgment, Task
from nemotron4.grading.sandbox import open_sandbox


def score_task(
    task: Task,
    items: Sequence[Item],
    responses: Mapping[str, Sequence[str]],
    judgments: Sequence[Judgment],
    source: DataSource,
    *,
    seed: int = 0,
    allow_unsafe: bool = False,
    judge: str | None = None,
    **more: Any,
) -> Result:
    """The result of a task over these items, answers and judgments; ``more`` goes into it as it is."""
    sandbox = open_sandbox(allow_unsafe=allow_unsafe) if task.needs_sandbox else None
    inputs = Inputs(
        items=items, responses=responses, judgments=judgments, source=source, seed=seed, sandbox=sandbox
    )
    content = source.main(task.main_file)
    return make_result(
        task,
        task.score(inputs),
        name=result_name(task, judge),
        num_items=len(items),
        data_sha256=content.sha256,
        data_is_standard=content.is_expected,
        example_sha256={
            file.path: source.read(file).sha256
            for file in task.files[1:]
            if file.sha256 is None and source.find(file) is not None
        },
        isolation=None if sandbox is None else sandbox.isolation,
        seed=seed,
        judge=judge,
        **more,
    )


def score_files(
    task: Task,
    source: DataSource,
    *,
    responses: Path | None,
    judgments: Path | None,
    seed: int = 0,
    allow_unsafe: bool = False,
    model: str | None = None,
    judge: str | None = None,
) -> Result:
    """Score what is on disk, without any model."""
    if task.judge is not None and judgments is None:
        raise ConfigError(f"{task.name} is scored by a judge", hint="pass --judgments FILE")
    if task.judge is None and judgments is not None:
        raise ConfigError(f"{task.name} has no judge", hint="leave --judgments out")
    if responses is None and task.needs_responses:
        raise ConfigError(f"{task.name} is scored from answers", hint="pass --responses FILE")
    items = task.load(source)
    found, num_outside = read_responses(responses, items, task.is_outside) if responses else ({}, 0)
    result = score_task(
        task,
        items,
        found,
        read_judgments(judgments, items) if judgments else [],
        source,
        seed=seed,
        allow_unsafe=allow_unsafe,
        model=model,
        judge=judge,
    )
    if not num_outside:
        return result
    return replace(result, notes=(*result.notes, f"{num_outside} answers to tasks outside this set left out"))
