"""LoRA adapters as NeMo saves them, merged: against the product in Megatron's own fused weights."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemotron4.checkpoint.convert import ConvertOptions, convert
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint
from nemotron4.checkpoint.opening import open_checkpoint
from nemotron4.errors import CheckpointError
from tests.checkpoint import nemo_layouts as layouts

CONFIG = layouts.tiny_config()
WEIGHTS = layouts.hugging_face_weights(CONFIG, torch.float32)
RANK, ALPHA = 4, 6.0
# NeMo's module -> the Megatron weight it changes, and whether its input is split over tensor ranks.
MODULES = {
    "self_attention.adapter_layer.lora_kqv_adapter": ("self_attention.linear_qkv", False),
    "self_attention.adapter_layer.lora_dense_attention_adapter": ("self_attention.linear_proj", True),
    "mlp.adapter_layer.lora_hto4h_adapter": ("mlp.linear_fc1", False),
    "mlp.adapter_layer.lora_4htoh_adapter": ("mlp.linear_fc2", True),
}


def factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """NeMo's module -> A and B of every layer, stacked."""
    generator = torch.Generator().manual_seed(3)
    megatron = layouts.megatron_weights(CONFIG, WEIGHTS)
    found = {}
    for module, (weight, _) in MODULES.items():
        layers, rows, columns = megatron[f"decoder.layers.{weight}.weight"].shape
        down = torch.randn(layers, RANK, columns, generator=generator)
        found[module] = down, torch.randn(layers, rows, RANK, generator=generator)
    return found


def write_settings(folder: Path, **changes: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tuning = {"adapter_dim": RANK, "alpha": ALPHA, "target_modules": ["all"]}
    values = layouts.settings(CONFIG) | {"peft": {"peft_scheme": "lora", "lora_tuning": tuning | changes}}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(values))


def write_ranks(folder: Path, *, tensor_parallel: int, pipeline_parallel: int) -> Path:
    """One ``model_weights.ckpt``, or one for each rank; layers are numbered within their stage."""
    write_settings(folder)
    per_stage = CONFIG.num_layers // pipeline_parallel
    for tensor in range(tensor_parallel):
        for stage in range(pipeline_parallel):
            state = {}
            for module, (down, up) in factors().items():
                cut = 1 if MODULES[module][1] else 0
                for local in range(per_stage):
                    layer = stage * per_stage + local
                    key = f"model.decoder.layers.{local}.{module}"
                    state[f"{key}.linear_in.weight"] = down[layer].chunk(tensor_parallel, cut)[tensor]
                    state[f"{key}.linear_out.weight"] = up[layer].chunk(tensor_parallel, 0)[tensor]
            place = folder
            if tensor_parallel * pipeline_parallel > 1:
                place = folder / f"tp_rank_{tensor:02}_pp_rank_{stage:03}"
                place.mkdir()
            torch.save(state, place / "model_weights.ckpt")
    return folder


def write_distributed(folder: Path) -> Path:
    write_settings(folder)
    for module, pair in factors().items():
        for name, tensor in zip(("linear_in", "linear_out"), pair, strict=True):
            key = f"decoder.layers.{module}.{name}.weight"
            layouts._write_zarr(folder / "model_weights" / f"model.{key}", key, tensor, 1)
    metadata = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    (folder / "model_weights" / "metadata.json").write_text(json.dumps(metadata))
    return folder


def packed(folder: Path, target: Path) -> Path:
    return layouts.pack(write_ranks(folder, tensor_parallel=1, pipeline_parallel=1), target)


@pytest.mark.parametrize("form", ["file", "ranks", "distributed"])
def test_a_merged_nemo_lora_equals_the_product_in_megatron_s_weights(tmp_path: Path, form: str) -> None:
    base = open_checkpoint(layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS, tensor_parallel=2))
    if form == "file":
        adapter = packed(tmp_path / "a", tmp_path / "a.nemo")
    elif form == "ranks":
        adapter = write_ranks(tmp_path / "a", tensor_parallel=2, pipeline_parallel=2)
    else:
        adapter = write_distributed(tmp_path / "a")
    convert(base, tmp_path / "hf", ConvertOptions(to="hf", adapter=adapter))
    merged = open_checkpoint(tmp_path / "hf")
    found = layouts.megatron_weights(CONFIG, {name: merged.read(name) for name in merged.tensors})
    expected = layouts.megatron_weights(CONFIG, WEIGHTS)
    for module, (down, up) in factors().items():
        expected[f"decoder.layers.{MODULES[module][0]}.weight"] += ALPHA / RANK * (up @ down)
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)


def test_what_is_not_a_lora_of_this_model_is_refused(tmp_path: Path) -> None:
    release = layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS)
    base = open_checkpoint(release)
    with pytest.raises(CheckpointError, match="peft_scheme is None"):
        MergedCheckpoint(base, release)
    adapter = write_ranks(tmp_path / "a", tensor_parallel=1, pipeline_parallel=1)
    write_settings(adapter, adapter_dim=RANK + 1)
    with pytest.raises(CheckpointError, match=f"adapter_dim is {RANK + 1}"):
        MergedCheckpoint(base, adapter)
    write_settings(adapter)
    other = layouts.tiny_config(hidden_size=2 * CONFIG.hidden_size)
    weights = layouts.hugging_face_weights(other)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        MergedCheckpoint(open_checkpoint(layouts.write_release(tmp_path / "o", other, weights)), adapter)


def test_a_pickle_in_place_of_the_factors_is_not_run(tmp_path: Path) -> None:
    base = open_checkpoint(layouts.write_release(tmp_path / "m", CONFIG, WEIGHTS))
    write_settings(tmp_path / "a")
    buffer = io.BytesIO()
    torch.save({"model.decoder.layers.0.x.weight": layouts.Hostile()}, buffer)
    (tmp_path / "a" / "model_weights.ckpt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="refused"):
        MergedCheckpoint(base, tmp_path / "a")
