"""Multiple choice by log-probability: prompts, choices, and what carries no answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nemotron4.client import EngineChatModel, FakeChatModel, HopelessError, TextLogprob
from nemotron4.errors import DataError
from nemotron4.evaluation.conversation import hold, of_item
from nemotron4.evaluation.data import DataSource
from nemotron4.evaluation.registry import TASKS
from nemotron4.evaluation.task import Inputs, Item
from nemotron4.evaluation.tasks.numbers import make_item
from tests.inference.small_engine import small_engine


def _source(tmp_path: Path, name: str, rows: Sequence[dict[str, Any]]) -> DataSource:
    folder = tmp_path / name
    folder.mkdir()
    for file in ("test", "train"):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(tmp_path)


WINOGRANDE = {
    "sentence": "The cup missed the box as _ was small.",
    "option1": "the box",
    "option2": "the cup",
    "answer": "1",
}
ARC = {"question": "Why?", "choices": {"text": ["no", "because"], "label": ["A", "B"]}, "answerKey": "B"}
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "She mixes. [step]",
    "ctx_b": "then she",
    "endings": ["bakes  it", "flies"],
    "label": "0",
}


@pytest.mark.parametrize(
    ("name", "row", "num_shots", "prompt", "choices"),
    [
        ("winogrande", WINOGRANDE, 5, "The cup missed the box as the box", [" was small.", " was small."]),
        ("arc_challenge", ARC, 25, "Question: Why?\nAnswer:", [" no", " because"]),
        ("hellaswag", HELLASWAG, 10, "Baking: She mixes. Then she", [" bakes it", " flies"]),
    ],
)
def test_prompts_hold_the_examples_and_the_question(
    tmp_path: Path, name: str, row: dict[str, Any], num_shots: int, prompt: str, choices: list[str]
) -> None:
    items = TASKS[name].load(_source(tmp_path, name, [row] * 30))
    weighed = items[0].fields["choices"]
    assert [continuation for _, continuation in weighed] == choices
    *examples, question = weighed[0][0].split("\n\n")
    assert len(examples) == num_shots
    assert question == prompt
    assert (
        examples[0]
        == weighed[items[0].fields["right"]][0].split("\n\n")[-1] + choices[items[0].fields["right"]]
    )


def test_too_few_examples_and_foreign_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="25 are needed"):
        TASKS["arc_challenge"].load(_source(tmp_path, "arc_challenge", [ARC]))
    with pytest.raises(DataError, match=":1: not a row"):
        TASKS["winogrande"].load(DataSource(tmp_path, _write(tmp_path / "test.jsonl", ARC)))


def _write(path: Path, row: dict[str, Any]) -> Path:
    path.write_text(json.dumps(row) + "\n")
    (path.parent / "train.jsonl").write_text((json.dumps(WINOGRANDE) + "\n") * 5)
    return path


def _item(name: str, right: int) -> Item:
    return make_item(name, ([("p", " a"), ("p", " bbbb")], ["a", "bbbb"], right))


def test_the_likeliest_choice_answers_in_total_and_per_character() -> None:
    responses = {"0": ["[-2.0, -4.0]"], "1": ["[-1.0, -1.0]"], "2": ["[NaN, -1.0]"]}
    items = [_item(str(n), 0) for n in range(3)]
    inputs = Inputs(items=items, responses=responses, source=DataSource(Path()))
    outcome = TASKS["arc_challenge"].score(inputs)
    assert outcome.metrics["accuracy"].value == 100
    assert outcome.metrics["accuracy_norm"].numerator == 0  # -2 per character against -1
    assert outcome.unscored == {
        "all choices have the same log-probability": 1,
        "log-probability is not a number": 1,
    }


class _Weigher(FakeChatModel):
    def __init__(self, values: dict[str, float]) -> None:
        super().__init__()
        self._values = values

    async def continuation_logprobs(
        self, prompt: str, continuations: Sequence[str]
    ) -> list[tuple[TextLogprob, ...]]:
        return [(TextLogprob(each, self._values[each]),) for each in continuations]


def test_a_model_is_asked_for_each_choice_and_equal_answers_are_refused() -> None:
    conversation = of_item(_item("0", 0), TASKS["arc_challenge"].sampling)

    answer = asyncio.run(hold(conversation, _Weigher({" a": -1.5, " bbbb": -3.0}), lambda _: None))
    assert json.loads(answer.texts[0]) == [-1.5, -3.0]
    with pytest.raises(HopelessError, match="equal log-probabilities"):
        asyncio.run(hold(conversation, _Weigher({" a": -1.5, " bbbb": -1.5}), lambda _: None))


@pytest.mark.parametrize(
    ("continuations", "num_prompt_tokens"),
    [(["A", "B", "C", "D"], 100), (["A", "BC"], 101 + 102)],
    ids=["of one token", "of several"],
)
def test_choices_weigh_what_the_whole_texts_do_and_letters_cost_one_pass(
    continuations: list[str], num_prompt_tokens: int
) -> None:
    prompt = "THE QUICK BROWN FOX." * 5
    with small_engine() as engine:
        found = asyncio.run(EngineChatModel(engine).continuation_logprobs(prompt, continuations))
        assert engine.stats().prompt_tokens_total == num_prompt_tokens
        whole = engine.score([prompt + each for each in continuations])
    for tokens, row, text in zip(found, whole, continuations, strict=True):
        assert [token.token for token in tokens] == list(text)
        assert [token.logprob for token in tokens] == pytest.approx(row[99:], abs=1e-5)
