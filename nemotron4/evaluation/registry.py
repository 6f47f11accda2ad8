"""The benchmarks by name, the only list of them; and where tasks of one's own are found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemotron4.errors import ConfigError, unknown_name
from nemotron4.evaluation.own import TASK_FILE, list_folders, open_folder, open_function
from nemotron4.evaluation.task import Task
from nemotron4.evaluation.tasks.alpaca_eval import ALPACA_EVAL, ALPACA_EVAL_SAMPLED
from nemotron4.evaluation.tasks.arena_hard import ARENA_HARD, ARENA_HARD_SAMPLED
from nemotron4.evaluation.tasks.code import HUMANEVAL, MBPP, MBPP_399, MBPP_427, MBPP_500
from nemotron4.evaluation.tasks.exact import BBH, GSM8K
from nemotron4.evaluation.tasks.mmlu import MMLU
from nemotron4.evaluation.tasks.mt_bench import MT_BENCH, MT_BENCH_FIRST
from nemotron4.evaluation.tasks.numbers import (
    ARC_CHALLENGE,
    HELLASWAG,
    MMLU_5SHOT,
    MMLU_LOGPROB,
    REWARDBENCH,
    WINOGRANDE,
)
from nemotron4.evaluation.tasks.rules import IFEVAL, TFEVAL

_ALL = (
    MT_BENCH,
    IFEVAL,
    MMLU,
    GSM8K,
    HUMANEVAL,
    MBPP,
    ARENA_HARD,
    ALPACA_EVAL,
    TFEVAL,
    REWARDBENCH,
    MBPP_399,
    MBPP_427,
    MBPP_500,
    MT_BENCH_FIRST,
    ARENA_HARD_SAMPLED,
    ALPACA_EVAL_SAMPLED,
    MMLU_LOGPROB,
    MMLU_5SHOT,
    ARC_CHALLENGE,
    HELLASWAG,
    WINOGRANDE,
    BBH,
)
TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}


def all_tasks(folder: Path) -> list[Task]:
    """Every benchmark, and the own tasks of the data folder."""
    return [*TASKS.values(), *(open_folder(path) for path in list_folders(folder))]


def find_task(name: str, folder: Path | None = None) -> Task:
    """A benchmark or own task of the data folder, a folder with ``task.toml``, or ``FILE.py:FUNCTION``."""
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if (path / TASK_FILE).is_file():
        return open_folder(path)
    if ".py:" in name:
        return open_function(name)
    own = {path.name: path for path in list_folders(folder)} if folder is not None else {}
    if name in own:
        return open_folder(own[name])
    message, hint = unknown_name("benchmark", name, [*TASKS, *own])
    raise ConfigError(message, hint=f"{hint}, or a folder with {TASK_FILE}")
