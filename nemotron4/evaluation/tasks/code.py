"""HumanEval (164 functions) and MBPP, zero-shot, pass@1 with the original tests, run in the sandbox.

MBPP has 378 tasks by default; 399, 427 and 500 by name. 378 (EvalPlus v0.2.0) is the likely set of the card's
75.4; 399 is EvalPlus v0.1.0, 427 the whole sanitized file, 500 the test split of the full file. Its prompt
shows the first assert only; all of them score.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import resources
from types import MappingProxyType
from typing import Any

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.evaluation.task import Inputs, Item, Outcome, Task, accuracy, answered, user, why
from nemotron4.grading import code
from nemotron4.grading.sandbox import Sandbox, open_sandbox
from nemotron4.grading.score import Score

HUMANEVAL_FILE = DataFile(
    path="humaneval/HumanEval.jsonl.gz",
    sha256="1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2",
    source="openai/human-eval @6d43fb9, data/HumanEval.jsonl.gz",
    licence="MIT",
    url="https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/"
    "data/HumanEval.jsonl.gz",
)
HUMANEVAL_INSTRUCTION = (
    "Read the following function signature and docstring, and fully implement the function described. Your"
    " response should only contain the code for this function.\n"
)


# The published extraction has the plain name; ``found`` takes the program out of every kind of fence.
METRICS: Mapping[str, code.Extraction] = MappingProxyType(
    {"pass@1": "extracted", "pass@1_found": "found", "pass@1_raw": "raw"}
)


def _load_humaneval(source: DataSource) -> list[Item]:
    content = source.main(HUMANEVAL_FILE)
    items = []
    for number, row in content.json_lines():
        try:
            fields = {name: row[name] for name in ("prompt", "test", "entry_point")}
            messages = user(HUMANEVAL_INSTRUCTION + row["prompt"])
            items.append(Item(id=row["task_id"], messages=messages, fields=fields))
        except KeyError as error:
            raise DataError(f"{content.path}:{number}: field {error} is missing") from error
    return items


def _run_all(
    items: Sequence[Item], program: Callable[[Item, code.Extraction], str], sandbox: Sandbox | None
) -> Outcome:
    """pass@1 of the extracted code, of code in any fence, and of the raw answer. Uses every core."""
    opened = sandbox or open_sandbox()

    def every(item: Item) -> dict[str, Score]:
        by_program: dict[str, Score] = {}
        found = {}
        for metric, extraction in METRICS.items():
            text = program(item, extraction)
            if text not in by_program:
                by_program[text] = code.run_program(text, opened)
            found[metric] = by_program[text]
        return found

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        scores = list(pool.map(every, items))
    return Outcome(
        metrics={metric: accuracy([each[metric] for each in scores]) for metric in METRICS},
        items={
            item.id: {metric: found.value for metric, found in each.items()}
            for item, each in zip(items, scores, strict=True)
        },
        reasons=why(items, [each["pass@1"] for each in scores]),
        notes=() if opened.isolation != "none" else ("code ran WITHOUT isolation",),
    )


def _score_humaneval(inputs: Inputs) -> Outcome:
    items, unscored = answered(inputs)

    def program(item: Item, extraction: code.Extraction) -> str:
        response, entry_point = inputs.responses[item.id][0], item.fields["entry_point"]
        if extraction == "found":
            text = code.find_program(response, entry_point)
        else:
            text = response if extraction == "raw" else code.extract_humaneval(response, entry_point)
        return code.humaneval_program(text, item.fields["prompt"], item.fields["test"], entry_point)

    outcome = _run_all(items, program, inputs.sandbox)
    return replace(outcome, unscored=unscored)


HUMANEVAL = Task(
    name="humaneval",
    title="HumanEval, 0-shot",
    files=(HUMANEVAL_FILE,),
    load=_load_humaneval,
    score=_score_humaneval,
    sampling=Sampling(max_tokens=1024),
    prompt=HUMANEVAL_INSTRUCTION + "{prompt}",
    card={"pass@1": 73.2},
    on_failure="wrong",  # as simple-evals, whose prompt this is
    needs_sandbox=True,
)


_MBPP_SOURCE = "google-research/google-research, mbpp/"
_MBPP_URL = "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/"
SANITIZED = DataFile(
    path="mbpp/sanitized-mbpp.json.gz",
    sha256="ca95deaa9a01ef0a6f439f88bcf0dd3db3563d22f22aad6cae04ebb9a8d8c8e9",
    source=_MBPP_SOURCE + "sanitized-mbpp.json",
    licence="CC BY 4.0",
    url=_MBPP_URL + "sanitized-mbpp.json",
)
FULL = DataFile(
    path="mbpp/mbpp.jsonl.gz",
    sha256="ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
    source=_MBPP_SOURCE + "mbpp.jsonl",
    licence="CC BY 4.0",
    url=_MBPP_URL + "mbpp.jsonl",
)
MBPP_PROMPT = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable"
    " responses to user instructions.\n\n@@ Instruction\nHere is the given problem and test examples:\n"
    "\n{description}\n{first_test}\n\n\n"
    "Please use the python programming language to solve this problem.\n"
    "Please make sure that your code includes the functions from the test samples and that the input and"
    " output formats of these functions match the test samples.\n"
    "Please return all completed codes in one code block.\n"
    "This code block should be in the following format:\n```python\n# Your codes here\n```"
)


def _mbpp_item(row: dict[str, Any], where: str) -> Item:
    try:
        description = row["prompt"] if "prompt" in row else row["text"]
        setup = row["test_imports"] if "test_imports" in row else row["test_setup_code"]
        fields = {"tests": row["test_list"], "setup": setup}
        prompt = MBPP_PROMPT.replace("{description}", description).replace(
            "{first_test}", row["test_list"][0]
        )
        return Item(id=str(row["task_id"]), messages=user(prompt), fields=fields)
    except (KeyError, IndexError) as error:
        raise DataError(f"{where}: a task lacks {error}") from error


def _load_mbpp(source: DataSource, file: DataFile, name: str) -> list[Item]:
    content = source.main(file)
    rows = content.rows()
    wanted = _ids(name)
    items = [
        _mbpp_item(row, str(content.path)) for row in rows if wanted is None or row.get("task_id") in wanted
    ]
    if not items:
        raise DataError(f"{content.path}: none of the tasks of {name} is in the file")
    return items


def _ids(name: str) -> set[int] | None:
    """Task ids of the named set; None takes every task of the file."""
    if name == "427":
        return None
    if name == "500":
        return set(range(11, 511))
    text = (resources.files("nemotron4.evaluation.tasks") / "mbpp_task_ids.json").read_text(encoding="utf-8")
    return set(json.loads(text)[name])


def _score_mbpp(inputs: Inputs) -> Outcome:
    items, unscored = answered(inputs)

    def program(item: Item, extraction: code.Extraction) -> str:
        response = inputs.responses[item.id][0]
        if extraction == "found":
            text = code.find_program(response, code.called_function(item.fields["tests"]))
        else:
            text = response if extraction == "raw" else code.extract_mbpp(response)
        return code.mbpp_program(text, item.fields["tests"], item.fields["setup"])

    outcome = _run_all(items, program, inputs.sandbox)
    return replace(outcome, unscored=unscored)


def _mbpp(size: str, file: DataFile, *, is_default: bool = False) -> Task:
    return Task(
        name="mbpp" if is_default else f"mbpp_{size}",
        title=f"MBPP, 0-shot, {size} tasks",
        files=(file,),
        load=lambda source: _load_mbpp(source, file, size),
        score=_score_mbpp,
        sampling=Sampling(max_tokens=2048),
        prompt=MBPP_PROMPT,
        card={"pass@1": 75.4} if is_default else {},
        on_failure="stop",  # EvalPlus refuses answers in which a task is missing
        needs_sandbox=True,
        is_outside=lambda name: name.isdigit() and 1 <= int(name) <= 974,
        note="that the card used these 378 tasks is an inference" if is_default else "",
    )


MBPP = _mbpp("378", SANITIZED, is_default=True)
MBPP_399 = _mbpp("399", SANITIZED)
MBPP_427 = _mbpp("427", SANITIZED)
MBPP_500 = _mbpp("500", FULL)
