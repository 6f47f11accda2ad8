"""Training with tokens that the start does not have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import float_rows
from nemotron4.errors import ConfigError
from nemotron4.training import inputs, run
from nemotron4.training.recipe import Recipe, build
from tests import tiny_models

TOKENS = ["<call>", "<|tool|>"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.llama_directory(tmp_path_factory.mktemp("start"))


def recipe(folder: Path, start: Path, **model: Any) -> Recipe:
    rows = [
        {"prompt": f"Add {i} and {i}: ", "completion": f"<call>add({i})<|tool|>{2 * i}"} for i in range(4)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = model.pop("adapter", None)
    values: dict[str, Any] = {
        "stage": "sft",
        "model": {"start": str(start), "device": "cpu", "new_tokens": TOKENS, **model},
        "data": {"train": [str(folder / "rows.jsonl")], "max_length": 120},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "batch": {"global_size": 4, "row_tokens": 480},
        "run": {"directory": str(folder / "run"), "max_steps": 2},
    }
    return build(values if adapter is None else values | {"adapter": adapter})


def test_new_rows_are_the_mean_of_the_known_ones(tmp_path: Path, start: Path) -> None:
    base = open_checkpoint(start)
    found = inputs.open_start(recipe(tmp_path, start))
    known = base.tokenizer().vocab_size
    assert [found.tokenizer().token_id(token) for token in TOKENS] == [known, known + 1]
    assert found.config.vocab_size % 64 == 0
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name not in base.tensors:
            continue
        whole, old = found.read(name, torch.float32), base.read(name, torch.float32)[:known]
        assert len(whole) == found.config.vocab_size
        assert torch.equal(whole[:known], old)
        torch.testing.assert_close(whole[known], old.mean(dim=0), rtol=1e-5, atol=1e-6)
    for name, info in found.tensors.items():  # what an engine that computes natively reads
        values = torch.from_numpy(float_rows(found, name, 0, info.shape[0]))
        assert torch.equal(values, found.read(name, torch.float32)), name


def test_a_model_with_new_tokens_trains_and_its_result_has_them(tmp_path: Path, start: Path) -> None:
    transformers = pytest.importorskip("transformers")
    summary = run.train(recipe(tmp_path, start))
    assert summary.output is not None
    made = open_checkpoint(summary.output)
    known = open_checkpoint(start).tokenizer().vocab_size
    assert made.tokenizer().encode("<call>a<|tool|>") == [
        known, *open_checkpoint(start).tokenizer().encode("a"), known + 1,
    ]  # fmt: skip
    assert made.tokenizer().decode([known]) == "<call>"
    rows = made.read("model.embed_tokens.weight", torch.float32)
    assert not torch.equal(rows[known], rows[known + 1])  # both have learnt
    with nemotron4.load(summary.output, dtype="float32", device="cpu", cache_gb=0.05) as engine:
        assert engine.generate("Add 1 and 1: ", max_new_tokens=3)[0].token_ids
    theirs = transformers.AutoTokenizer.from_pretrained(summary.output)
    assert theirs("<call>", add_special_tokens=False)["input_ids"] == [known]
    # The same command has nothing left to do.
    assert run.train(recipe(tmp_path, start)).steps == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"new_tokens": ["<a>", "<a>"]}, "is there already"),
        ({"new_tokens": [""]}, "or empty"),
        ({"adapter": {"kind": "lora", "targets": ["all"]}}, "an adapter freezes them"),
    ],
)
def test_new_tokens_that_cannot_be_are_refused(
    tmp_path: Path, start: Path, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run.train(recipe(tmp_path, start, **model))
