"""BIG-Bench Hard: the files put together, the raw prompt with its examples, the exact match."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from nemotron4.client import FakeChatModel, Reply, Sampling
from nemotron4.errors import DataError
from nemotron4.evaluation.conversation import hold, of_item
from nemotron4.evaluation.data import Content, DataSource
from nemotron4.evaluation.registry import TASKS
from nemotron4.evaluation.task import Inputs
from nemotron4.evaluation.tasks import exact as bbh

PROMPTS = {"navigate": "About turns.\n\nQ: 1\nA: 2", "word_sorting": "About words.\n\nQ: 3\nA: 4"}


def _content(*rows: dict[str, str]) -> Content:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return Content(Path("test.jsonl"), data, "", False)


ROWS = (
    *({"task": "navigate", "input": f"Turn {n}.", "target": "No"} for n in range(3)),
    {"task": "word_sorting", "input": "b a", "target": "a b"},
)


def test_the_published_files_become_one_file_of_questions_and_one_of_prompts() -> None:
    def download(url: str) -> bytes:
        if url.endswith(".json"):
            return json.dumps({"canary": "c", "examples": [{"input": "i", "target": "t"}]}).encode()
        return f"canary\n-----\nAbout.\n\nQ: x\n{bbh.STEPS} So.\n".encode()

    questions = bbh.build_questions(download).decode().splitlines()
    assert len(questions) == len(bbh.TASK_NAMES) == 27
    assert json.loads(questions[-1]) == {"task": "word_sorting", "input": "i", "target": "t"}
    prompt = json.loads(bbh.build_prompts(download).decode().splitlines()[0])["prompt"]
    assert prompt == f"About.\n\nQ: x\n{bbh.STEPS}\nSo."


def test_the_model_continues_the_examples_as_a_raw_text() -> None:
    item = bbh.make_items(_content(*ROWS), PROMPTS)[0]
    asked: list[tuple[str, Sampling]] = []

    class Continuer(FakeChatModel):
        async def complete(self, prompt: str, sampling: Sampling) -> Reply:
            asked.append((prompt, sampling))
            return Reply(text="So the answer is No.", finish_reason="stop", model="m", completion_tokens=6)

    answer = asyncio.run(hold(of_item(item, TASKS["bbh"].sampling), Continuer(), lambda _: None))
    assert asked[0][0] == f"About turns.\n\nQ: 1\nA: 2\n\nQ: Turn 0.\n{bbh.STEPS}\n"
    assert asked[0][1].stop == ("</s>", "Q", "\n\n")
    assert answer.to_json()["response"] == "So the answer is No."
    assert answer.completion_tokens == 6


def test_the_answer_is_matched_exactly_and_tasks_are_averaged_beside() -> None:
    items = bbh.make_items(_content(*ROWS), PROMPTS)
    responses = {
        "navigate/0": ["We turn. So the answer is No."],
        "navigate/1": ["So the answer is no."],
        "navigate/2": ["No."],
        "word_sorting/0": ["So the answer is a b."],
    }
    outcome = TASKS["bbh"].score(Inputs(items=items, responses=responses, source=DataSource(Path())))
    assert outcome.metrics["accuracy"].value == 50
    assert outcome.metrics["macro_accuracy"].value == pytest.approx(200 / 3)
    assert outcome.unparsed == 1


def test_a_task_without_examples_and_a_foreign_row_are_refused() -> None:
    with pytest.raises(DataError, match=r"test.jsonl:1: no worked examples of the task 'chess'"):
        bbh.make_items(_content({"task": "chess", "input": "", "target": ""}), PROMPTS)
    with pytest.raises(DataError, match="field 'target' is missing"):
        bbh.make_items(_content({"task": "navigate", "input": ""}), PROMPTS)
