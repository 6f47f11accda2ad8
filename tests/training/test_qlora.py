"""LoRA on a base of eight or four bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron4.checkpoint import open_checkpoint
from nemotron4.errors import ConfigError
from nemotron4.model.quantized_weight import quantized_weights
from nemotron4.training import checks, inputs, parallel, run
from nemotron4.training.loading import Origin
from nemotron4.training.packing import pack
from nemotron4.training.recipe import Recipe, build
from nemotron4.training.samples import Sample, Segment
from tests import tiny_models


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.nemotron_directory(tmp_path_factory.mktemp("start"))


def recipe(folder: Path, start: Path, **more: Any) -> Recipe:
    row = {"prompt": [{"role": "user", "content": "Add 1 and 1"}], "chosen": "2", "rejected": "It is 3."}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    values: dict[str, Any] = {
        "stage": "preference",
        "model": {"start": str(start), "device": "cpu", "quantize": "int8"},
        "data": {"train": [str(folder / "rows.jsonl")], "max_length": 80},
        "preference": {"loss": "dpo", "beta": 0.5},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "batch": {"global_size": 4, "row_tokens": 200},
        "adapter": {"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj", "up_proj"]},
        "run": {"directory": str(folder / "run"), "max_steps": 4},
    }
    for name, value in more.items():
        old = values.get(name)
        values[name] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
    return build({name: value for name, value in values.items() if value is not None})


def logprobs(made: Recipe) -> torch.Tensor:
    base = open_checkpoint(made.model.start or "")
    engine = parallel.build(Origin(made, base, inputs.model_config(made, base)), None, torch.device("cpu"))
    tokens = tuple(range(5, 45))
    return engine.score(pack([Sample((Segment(tokens, (True,) * 40),))]))


@pytest.mark.parametrize(("kind", "close"), [("int8", 0.1), ("int4", 1.5), ("nf4", 1.5)])
def test_a_quantised_base_is_near_the_whole_one(tmp_path: Path, start: Path, kind: str, close: float) -> None:
    made = recipe(tmp_path, start, model={"quantize": kind})
    whole = replace(made, model=replace(made.model, quantize=None))
    difference = (logprobs(made) - logprobs(whole)).abs().max()
    assert 0 < difference < close


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_an_adapter_on_it_trains_and_opens_on_the_whole_base(
    tmp_path: Path, start: Path, kind: str, compute: str
) -> None:
    made = recipe(tmp_path, start, model={"quantize": kind, "compute": compute})
    summary = run.train(made)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[0] == pytest.approx(0.6931, abs=2e-2)  # the reference is the quantised base
    assert losses[-1] < losses[0] - 0.01
    assert summary.output is not None
    model = replace(made.model, quantize=None, compute="float32", start=str(summary.output))
    loaded = replace(made, model=model)
    assert logprobs(loaded).isfinite().all()


def test_all_layers_of_the_blocks_are_codes_and_the_memory_counts_them(tmp_path: Path, start: Path) -> None:
    made = recipe(tmp_path, start)
    base = open_checkpoint(start)
    config = inputs.model_config(made, base)
    engine = parallel.build(Origin(made, base, config), None, torch.device("cpu"))
    net = engine.scorer.net
    assert len(quantized_weights(net)) == 6 * config.num_layers
    assert not [name for name, _ in net.named_parameters() if name.endswith("_proj.weight")]
    held = sum(p.nbytes for p in net.parameters()) + sum(
        b.nbytes for weight in quantized_weights(net).values() for b in weight.buffers()
    )
    assert checks.memory(made, config)[0] == held
    whole = replace(made, model=replace(made.model, quantize=None))
    assert checks.memory(whole, config)[0] > held


@pytest.mark.parametrize("adapter", [None, {"kind": "p_tuning"}, {"use_dora": True}])
def test_what_cannot_be_quantised_is_refused(tmp_path: Path, start: Path, adapter: dict | None) -> None:
    made = recipe(tmp_path, start, adapter=adapter)
    with pytest.raises(ConfigError, match=r"model\.quantize = int8 is for an \[adapter\] of kind lora"):
        run.train(made)
