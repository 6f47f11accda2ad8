"""MBPP, zero-shot, pass@1 with the original asserts: 378 tasks by default, 399, 427 and 500 by name.

378 (EvalPlus v0.2.0) is the likely set of the card's 75.4; 399 is EvalPlus v0.1.0, 427 the whole sanitized
file, 500 the test split of the full file. The prompt shows the first assert only; all of them score.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.evaluation.task import Inputs, Item, Outcome, Task, answered, user
from nemotron4.evaluation.tasks.humaneval import run_all
from nemotron4.grading import code

_SOURCE = "google-research/google-research, mbpp/"
_URL = "https://raw.githubusercontent.com/google-research/google-research/master/mbpp/"
SANITIZED = DataFile(
    path="mbpp/sanitized-mbpp.json.gz",
    sha256="ca95deaa9a01ef0a6f439f88bcf0dd3db3563d22f22aad6cae04ebb9a8d8c8e9",
    source=_SOURCE + "sanitized-mbpp.json",
    licence="CC BY 4.0",
    url=_URL + "sanitized-mbpp.json",
)
FULL = DataFile(
    path="mbpp/mbpp.jsonl.gz",
    sha256="ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
    source=_SOURCE + "mbpp.jsonl",
    licence="CC BY 4.0",
    url=_URL + "mbpp.jsonl",
)
PROMPT = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable"
    " responses to user instructions.\n\n@@ Instruction\nHere is the given problem and test examples:\n"
    "\n{description}\n{first_test}\n\n\n"
    "Please use the python programming language to solve this problem.\n"
    "Please make sure that your code includes the functions from the test samples and that the input and"
    " output formats of these functions match the test samples.\n"
    "Please return all completed codes in one code block.\n"
    "This code block should be in the following format:\n```python\n# Your codes here\n```"
)


def _item(row: dict[str, Any], where: str) -> Item:
    try:
        description = row["prompt"] if "prompt" in row else row["text"]
        setup = row["test_imports"] if "test_imports" in row else row["test_setup_code"]
        fields = {"tests": row["test_list"], "setup": setup}
        prompt = PROMPT.replace("{description}", description).replace("{first_test}", row["test_list"][0])
        return Item(id=str(row["task_id"]), messages=user(prompt), fields=fields)
    except (KeyError, IndexError) as error:
        raise DataError(f"{where}: a task lacks {error}") from error


def _load(source: DataSource, file: DataFile, name: str) -> list[Item]:
    content = source.main(file)
    rows = content.rows()
    wanted = _ids(name)
    items = [_item(row, str(content.path)) for row in rows if wanted is None or row.get("task_id") in wanted]
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


def score(inputs: Inputs) -> Outcome:
    items, unscored = answered(inputs)

    def program(item: Item, extraction: code.Extraction) -> str:
        response = inputs.responses[item.id][0]
        text = response if extraction == "raw" else code.extract_mbpp(response)
        return code.mbpp_program(text, item.fields["tests"], item.fields["setup"])

    outcome = run_all(items, program, inputs.sandbox)
    return Outcome(metrics=outcome.metrics, unscored=unscored, items=outcome.items, notes=outcome.notes)


def _task(size: str, file: DataFile, *, is_default: bool = False) -> Task:
    return Task(
        name="mbpp" if is_default else f"mbpp_{size}",
        title=f"MBPP, 0-shot, {size} tasks",
        files=(file,),
        load=lambda source: _load(source, file, size),
        score=score,
        sampling=Sampling(max_tokens=2048),
        prompt=PROMPT,
        card={"pass@1": 75.4} if is_default else {},
        needs_sandbox=True,
        is_outside=lambda name: name.isdigit() and 1 <= int(name) <= 974,
        note="that the card used these 378 tasks is an inference" if is_default else "",
    )


MBPP = _task("378", SANITIZED, is_default=True)
MBPP_399 = _task("399", SANITIZED)
MBPP_427 = _task("427", SANITIZED)
MBPP_500 = _task("500", FULL)
