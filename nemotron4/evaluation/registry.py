"""The benchmarks by name. The only list of them."""

from __future__ import annotations

from collections.abc import Mapping

from nemotron4.errors import ConfigError, unknown_name
from nemotron4.evaluation.task import Task
from nemotron4.evaluation.tasks.alpaca_eval import ALPACA_EVAL, ALPACA_EVAL_SAMPLED
from nemotron4.evaluation.tasks.arena_hard import ARENA_HARD, ARENA_HARD_SAMPLED
from nemotron4.evaluation.tasks.bbh import BBH
from nemotron4.evaluation.tasks.choices import ARC_CHALLENGE, HELLASWAG, MMLU_5SHOT, MMLU_LOGPROB, WINOGRANDE
from nemotron4.evaluation.tasks.gsm8k import GSM8K
from nemotron4.evaluation.tasks.humaneval import HUMANEVAL
from nemotron4.evaluation.tasks.ifeval import IFEVAL
from nemotron4.evaluation.tasks.mbpp import MBPP, MBPP_399, MBPP_427, MBPP_500
from nemotron4.evaluation.tasks.mmlu import MMLU
from nemotron4.evaluation.tasks.mt_bench import MT_BENCH, MT_BENCH_FIRST
from nemotron4.evaluation.tasks.rewardbench import REWARDBENCH
from nemotron4.evaluation.tasks.tfeval import TFEVAL

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


def find_task(name: str) -> Task:
    if name not in TASKS:
        message, hint = unknown_name("benchmark", name, TASKS)
        raise ConfigError(message, hint=hint)
    return TASKS[name]
