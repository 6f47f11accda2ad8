"""A recipe's prompt format: what is rendered in it, what keeps it, and the date that a template writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.errors import TemplateError
from nemotron4.records import Message
from nemotron4.text.prompt import render
from nemotron4.training import chain, run, run_chain
from nemotron4.training.inputs import build_encoder, model_config, open_start, read_data
from nemotron4.training.recipe import Recipe, build
from nemotron4.training.stages.sft import never_stops
from tests import tiny_models

HI = [Message("user", "Hi")]
DATED = "{{ strftime_now('%d %b %Y') }}|" + tiny_models.CHATML


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama_directory(tmp_path_factory.mktemp("llama"))


def values(folder: Path, start: Path, prompt_format: str, **more: object) -> dict:
    row = {"messages": [m.to_json() for m in (*HI, Message("assistant", "Hello."))]}
    (folder / "chats.jsonl").write_text(json.dumps(row) + "\n")
    return {
        "stage": "sft",
        "model": {"start": str(start), "device": "cpu", "prompt_format": prompt_format},
        "data": {"train": [str(folder / "chats.jsonl")], "max_length": 128},
        "optimizer": {"learning_rate": 1e-3},
        "batch": {"global_size": 1, "row_tokens": 128},
        "run": {"directory": str(folder / "run"), "max_steps": 1},
        **more,
    }


def rendered(recipe: Recipe) -> str:
    base = open_start(recipe)
    read = read_data(recipe, build_encoder(recipe, base, model_config(recipe, base)))
    return base.tokenizer().decode(read.train[0].segments[0].tokens)


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "rank": 2}, {"kind": "p_tuning"}])
def test_what_trains_in_the_cards_format_is_served_in_it(
    tmp_path: Path, llama: Path, adapter: dict | None
) -> None:
    settings = values(tmp_path, llama, "nemotron4", **({} if adapter is None else {"adapter": adapter}))
    recipe = build(settings)
    if adapter is None:
        assert rendered(recipe) == render(HI) + "Hello.\n<extra_id_1>"
    made = run.train(recipe).output
    assert made is not None
    model, beside = (made, None) if adapter is None else (llama, made)
    with nemotron4.load(model, adapter=beside, device="cpu") as engine:
        assert engine.prompt_format is not None
        assert engine.prompt_format.render(HI) == render(HI)
        assert "<extra_id_1>" in engine.prompt_format.stop_strings


def test_a_later_stage_of_a_chain_keeps_the_format(tmp_path: Path, llama: Path) -> None:
    common = values(tmp_path, llama, "nemotron4")
    (tmp_path / "chain.toml").write_text(
        f'data = {{ train = ["{common["data"]["train"][0]}"], max_length = 128 }}\n'
        "optimizer.learning_rate = 1e-3\nbatch = { global_size = 1, row_tokens = 128 }\n"
        f'run = {{ directory = "{tmp_path / "chain"}", max_steps = 1 }}\n'
        'adapter = { kind = "lora", rank = 2 }\n'
        f'[[stage]]\nname = "a"\nkind = "sft"\nmodel = {{ start = "{llama}", prompt_format = "nemotron4" }}\n'
        '[[stage]]\nname = "b"\nkind = "sft"\nmodel = { start = "previous" }\n'
    )
    made = run_chain.run(chain.load(tmp_path / "chain.toml", [])).output
    assert made is not None
    found = open_checkpoint(made).prompt_format()
    assert found is not None
    assert found.render(HI) == render(HI)


def test_a_marker_that_the_vocabulary_lacks_ends_an_answer_as_text(tmp_path: Path, llama: Path) -> None:
    recipe = build(values(tmp_path, llama, "nemotron4"))
    base = open_start(recipe)
    encoder = build_encoder(recipe, base, model_config(recipe, base))
    sample = read_data(recipe, encoder).train[0]
    assert [*never_stops(sample, encoder)] == []


def test_an_unknown_format_is_refused_before_training(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(TemplateError, match="nemotron5"):
        run.train(build(values(tmp_path, llama, "nemotron5")))


def test_the_date_of_a_template_is_that_of_the_runs_start(tmp_path: Path, llama: Path) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    recipe = build(values(tmp_path, llama, str(template)))
    run.train(recipe)
    path = recipe.run.directory / "run.json"
    record = json.loads(path.read_text())
    day = record["facts"]["date in the prompt"]
    assert len(day) == len("2026-11-29")
    record["facts"]["date in the prompt"] = "2020-02-03"  # as if the run had begun on another day
    path.write_text(json.dumps(record))
    assert rendered(recipe).startswith("03 Feb 2020|")
    assert (recipe.run.directory / "model" / "chat_template.jinja").read_text() == DATED
