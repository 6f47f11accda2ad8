"""HumanEval: 164 functions, zero-shot, pass@1 with the original tests, run in the sandbox."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from nemotron4.client.interface import Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.data import DataFile, DataSource
from nemotron4.evaluation.task import Inputs, Item, Outcome, Task, accuracy, answered, user
from nemotron4.grading import code
from nemotron4.grading.sandbox import Sandbox, open_sandbox
from nemotron4.grading.score import Score

FILE = DataFile(
    path="humaneval/HumanEval.jsonl.gz",
    sha256="1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2",
    source="openai/human-eval @6d43fb9, data/HumanEval.jsonl.gz",
    licence="MIT",
    url="https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/"
    "data/HumanEval.jsonl.gz",
)
INSTRUCTION = (
    "Read the following function signature and docstring, and fully implement the function described. Your"
    " response should only contain the code for this function.\n"
)


def load(source: DataSource) -> list[Item]:
    content = source.main(FILE)
    items = []
    for number, row in content.json_lines():
        try:
            fields = {name: row[name] for name in ("prompt", "test", "entry_point")}
            items.append(Item(id=row["task_id"], messages=user(INSTRUCTION + row["prompt"]), fields=fields))
        except KeyError as error:
            raise DataError(f"{content.path}:{number}: field {error} is missing") from error
    return items


def run_all(
    items: Sequence[Item], program: Callable[[Item, code.Extraction], str], sandbox: Sandbox | None
) -> Outcome:
    """pass@1 of the extracted code, and of the raw answer beside it. Programs run on every core."""
    opened = sandbox or open_sandbox()

    def both(item: Item) -> tuple[Score, Score]:
        extracted, raw = program(item, "extracted"), program(item, "raw")
        first = code.run_program(extracted, opened)
        return first, first if raw == extracted else code.run_program(raw, opened)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        pairs = list(pool.map(both, items))
    return Outcome(
        metrics={"pass@1": accuracy([a for a, _ in pairs]), "pass@1_raw": accuracy([b for _, b in pairs])},
        items={
            item.id: {"pass@1": a.value, "pass@1_raw": b.value}
            for item, (a, b) in zip(items, pairs, strict=True)
        },
        notes=() if opened.isolation != "none" else ("code ran WITHOUT isolation",),
    )


def score(inputs: Inputs) -> Outcome:
    items, unscored = answered(inputs)

    def program(item: Item, extraction: code.Extraction) -> str:
        response, entry_point = inputs.responses[item.id][0], item.fields["entry_point"]
        text = response if extraction == "raw" else code.extract_humaneval(response, entry_point)
        return code.humaneval_program(text, item.fields["prompt"], item.fields["test"], entry_point)

    outcome = run_all(items, program, inputs.sandbox)
    return Outcome(metrics=outcome.metrics, unscored=unscored, items=outcome.items, notes=outcome.notes)


HUMANEVAL = Task(
    name="humaneval",
    title="HumanEval, 0-shot",
    files=(FILE,),
    load=load,
    score=score,
    sampling=Sampling(max_tokens=1024),
    prompt=INSTRUCTION + "{prompt}",
    card={"pass@1": 73.2},
    needs_sandbox=True,
)
