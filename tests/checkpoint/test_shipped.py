"""The adapter that ships: what it is, when it is used, and that the demo model ends its answers with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nemotron4
from nemotron4.checkpoint import shipped
from nemotron4.checkpoint.adapter_base import BASE_FILE
from nemotron4.checkpoint.shipped import AUTO, FOLDER, NONE, WEIGHTS, chosen_adapter, with_shipped
from nemotron4.records import Message
from nemotron4.text.prompt import CARD_QUESTION, card_prompt, chatml

MARKER = "<extra_id_1>"


def test_only_the_pulled_name_has_one(tmp_path: Path) -> None:
    assert chosen_adapter("smollm2", AUTO) == FOLDER
    assert chosen_adapter(tmp_path / "smollm2", AUTO) is None
    assert chosen_adapter("smollm2", NONE) is None
    assert chosen_adapter("smollm2", None) is None
    assert chosen_adapter("smollm2", "runs/mine") == Path("runs/mine")


def test_it_is_small_licensed_and_names_its_base_without_a_path() -> None:
    assert WEIGHTS.stat().st_size < 6_000_000
    assert "Apache License" in (FOLDER / "LICENSE").read_text()
    base = json.loads((FOLDER / BASE_FILE).read_text())
    assert (base["base"], base["path"]) == ("smollm2", "")
    assert json.loads((FOLDER / "adapter_config.json").read_text())["base_model_name_or_path"] == "smollm2"


@pytest.mark.demo_model
def test_answers_in_the_cards_format_end_by_its_marker(demo_model: Path) -> None:
    questions = [CARD_QUESTION, "What is the capital of France?", "Give me three facts about gravity."]
    with nemotron4.load("smollm2") as engine:
        answers = engine.generate(
            [card_prompt(question) for question in questions], max_new_tokens=256, temperature=0, stop=MARKER
        )
    assert [answer.finish_reason for answer in answers] == ["stop"] * 3
    assert all(answer.text.strip() for answer in answers)
    assert "Paris" in answers[1].text


@pytest.mark.demo_model
def test_a_chat_is_in_the_format_that_it_was_trained_in(demo_model: Path) -> None:
    with nemotron4.load("smollm2") as engine:
        chat = engine.prompt_format
        assert chat is not None
        assert chat.encode(engine.tokenizer, [Message("user", CARD_QUESTION)]) == engine.tokenizer.encode(
            card_prompt()
        )
        [answer] = engine.generate(
            [card_prompt()], max_new_tokens=256, temperature=1.0, top_p=0.9, seed=1, stop=chat.stop_strings
        )
        assert answer.finish_reason == "stop"
    with nemotron4.load("smollm2", adapter=NONE) as bare:
        assert bare.prompt_format is not None
        assert "<|im_start|>user" in bare.prompt_format.render([Message("user", CARD_QUESTION)])
    with nemotron4.load("smollm2", chat_template="chatml") as other:
        assert other.prompt_format == chatml()


@pytest.mark.demo_model
def test_none_is_the_bare_model(demo_model: Path) -> None:
    assert with_shipped("smollm2", NONE) == ("smollm2", None)
    with nemotron4.load("smollm2", adapter=NONE) as engine:
        [answer] = engine.generate([card_prompt()], max_new_tokens=96, temperature=0, stop=MARKER)
    assert answer.finish_reason == "length"


@pytest.mark.demo_model
def test_a_cache_that_cannot_be_written_merges_in_memory(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(merged: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shipped, "_merge", full)
    monkeypatch.setattr(shipped, "WEIGHTS", FOLDER / "adapter_config.json")  # so that no merged file is found
    assert with_shipped("smollm2", AUTO) == ("smollm2", FOLDER)
