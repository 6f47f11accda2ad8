"""Weights as other trainers leave them: safetensors with the names of Megatron, DCP folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron4.checkpoint.convert import ConvertOptions, convert
from nemotron4.checkpoint.load import load_transformer
from nemotron4.checkpoint.nemo import NemoCheckpoint
from nemotron4.checkpoint.opening import open_checkpoint
from nemotron4.checkpoint.write_huggingface import config_json
from nemotron4.errors import CheckpointError
from tests.checkpoint import nemo_layouts as layouts
from tests.tiny_models import llama_directory, nemotron_directory, sentencepiece_model

CONFIG = layouts.tiny_config()
WEIGHTS = layouts.hugging_face_weights(CONFIG)


def megatron_safetensors(folder: Path, prefix: str, *, is_sharded: bool) -> None:
    folder.mkdir()
    state: dict[str, torch.Tensor] = {}
    for key, tensor in layouts.megatron_weights(CONFIG, WEIGHTS).items():
        if ".layers." in key:
            for layer, part in enumerate(tensor):
                name = key.replace(".layers.", f".layers.{layer}.")
                state[prefix + name] = part.contiguous()
        else:
            state[prefix + key] = tensor.contiguous()
    if not is_sharded:
        save_file(state, folder / "model.safetensors")
        return
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("form", ["config.json", "model_config.yaml"])
@pytest.mark.parametrize(("prefix", "is_sharded"), [("", False), ("model.", True)])
def test_megatron_s_names_in_safetensors_read_like_nemo_s(
    tmp_path: Path, form: str, prefix: str, is_sharded: bool
) -> None:
    folder = tmp_path / "m"
    megatron_safetensors(folder, prefix, is_sharded=is_sharded)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    if form == "config.json":
        (folder / form).write_text(json.dumps(config_json(CONFIG, dtype=torch.bfloat16)))
    else:
        layouts._write_settings(folder, layouts.settings(CONFIG))
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, NemoCheckpoint)
    assert set(checkpoint.tensors) == set(WEIGHTS)
    for name, expected in WEIGHTS.items():
        assert torch.equal(checkpoint.read(name), expected), name
    load_transformer(checkpoint, dtype=torch.float32)
    convert(checkpoint, tmp_path / "hf", ConvertOptions(to="hf"))
    opened = open_checkpoint(tmp_path / "hf")
    assert all(torch.equal(opened.read(name), expected) for name, expected in WEIGHTS.items())


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    megatron_safetensors(tmp_path / "m", "", is_sharded=False)
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    del state["decoder.layers.0.mlp.linear_fc1.weight"]
    save_file(state, file)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config_json(CONFIG, dtype=torch.bfloat16)))
    with pytest.raises(CheckpointError, match=r"linear_fc1\.weight: layers \[1, .*\] do not make one stack"):
        open_checkpoint(tmp_path / "m")


TITAN = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def dcp_folder(source: Path, folder: Path, state: dict[str, Any]) -> Path:
    from torch.distributed import checkpoint as dcp

    dcp.save(state, checkpoint_id=folder, no_dist=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("make", [nemotron_directory, llama_directory])
def test_a_dcp_folder_with_hugging_face_s_names(tmp_path: Path, make: Any, prefix: str) -> None:
    source = make(tmp_path / "m")
    weights = load_file(source / "model.safetensors")
    state: dict[str, Any] = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    state["optimizer.state.model.norm.weight.exp_avg"] = torch.ones(3)
    folder = dcp_folder(source, tmp_path / "dcp", state)
    checkpoint = open_checkpoint(folder)
    for name, tensor in weights.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    load_transformer(checkpoint, dtype=torch.float32)
    convert(checkpoint, tmp_path / "hf", ConvertOptions(to="hf"))
    assert open_checkpoint(tmp_path / "hf").tensors.keys() == checkpoint.tensors.keys()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="without their configuration") as caught:
        open_checkpoint(folder)
    assert "config.json" in str(caught.value.hint)


@pytest.mark.filterwarnings("ignore")
def test_a_dcp_folder_of_torchtitan(tmp_path: Path) -> None:
    source = llama_directory(tmp_path / "m", tie_word_embeddings=False)
    weights = load_file(source / "model.safetensors")
    head_dim = json.loads((source / "config.json").read_text())["head_dim"]
    state = {}
    for name, tensor in weights.items():
        key = name
        for ours, theirs in TITAN.items():
            key = key.replace(ours, theirs)
        if ".wq." in key or ".wk." in key:  # rows 2i and 2i + 1 of a head turn together there
            halves = tensor.unflatten(0, (-1, 2, head_dim // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2).contiguous()
        state[key.removeprefix("model.")] = tensor
    checkpoint = open_checkpoint(dcp_folder(source, tmp_path / "dcp", state))
    for name, tensor in weights.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(checkpoint.read_rows(name, 3, 11), weights[name][3:11])
    load_transformer(checkpoint, dtype=torch.float32)
