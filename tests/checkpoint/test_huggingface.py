"""Hugging Face directories that transformers wrote, against transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.errors import CheckpointError
from nemotron4.model.config import RopeScaling
from tests.tiny_models import llama_directory, nemotron_directory


@pytest.fixture
def nemotron(tmp_path: Path) -> Path:
    return nemotron_directory(tmp_path / "tiny-nemotron")


def edit_config(directory: Path, *, remove: tuple[str, ...] = (), **values: Any) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    for name in remove:
        del config[name]
    file.write_text(json.dumps(config | values))


def rewrite_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; ``__`` in a name stands for a dot."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, file)


BUILDERS = {"nemotron": nemotron_directory, "llama": llama_directory}


@pytest.mark.parametrize("shard", ["5GB", "60KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("family", BUILDERS)
def test_logits_equal_transformers(tmp_path: Path, family: str, shard: str) -> None:
    directory = BUILDERS[family](tmp_path / family, max_shard_size=shard)
    assert (directory / "model.safetensors").exists() == (shard == "5GB")
    peer = AutoModelForCausalLM.from_pretrained(directory)
    model, report = load_transformer(open_checkpoint(directory), dtype=torch.float32)
    tokens_BT = torch.randint(0, 512, (2, 31), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), peer(tokens_BT).logits, atol=1e-4, rtol=1e-4)
    assert set(report.loaded) | report.skipped.keys() == set(model.state_dict())
    assert set(report.loaded) == set(open_checkpoint(directory).tensors)


def test_bfloat16_weights_are_read_bit_for_bit(tmp_path: Path) -> None:
    directory = nemotron_directory(tmp_path / "m", dtype=torch.bfloat16)
    checkpoint = open_checkpoint(directory)
    for name, expected in load_file(directory / "model.safetensors").items():
        assert checkpoint.tensors[name].dtype == "bfloat16"
        assert torch.equal(checkpoint.read(name), expected)
        assert checkpoint.read(name, torch.float32).dtype is torch.float32


def test_a_mistral_model_without_a_window_is_a_llama_block(tmp_path: Path) -> None:
    values = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": None}
    peer = MistralForCausalLM(MistralConfig(**values, **heads, max_position_embeddings=64)).eval()
    peer.save_pretrained(tmp_path / "m")
    model, _ = load_transformer(open_checkpoint(tmp_path / "m"), dtype=torch.float32)
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), peer(tokens_BT).logits, atol=1e-4, rtol=1e-4)
    edit_config(tmp_path / "m", sliding_window=16)
    with pytest.raises(CheckpointError, match="sliding_window is 16"):
        open_checkpoint(tmp_path / "m")
    edit_config(tmp_path / "m", remove=("sliding_window",), max_position_embeddings=8192)
    with pytest.raises(CheckpointError, match="sliding_window is 4096"):  # transformers' where none is named
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("remove", "values"),
    [
        (("rope_parameters",), {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}),
        (("rope_parameters",), {"rope_percent": 0.5}),
        (("rope_parameters",), {"rope_percentage": 0.5, "rope_scaling": None}),
        (("rope_parameters",), {}),
        (("head_dim",), {"kv_channels": 16}),
        ((), {"kv_channels": None}),
        (("tie_word_embeddings", "attention_bias", "mlp_bias"), {}),
    ],
)
def test_every_spelling_gives_the_same_configuration(
    nemotron: Path, remove: tuple[str, ...], values: dict[str, Any]
) -> None:
    expected = open_checkpoint(nemotron).config
    edit_config(nemotron, remove=remove, **values)
    assert open_checkpoint(nemotron).config == expected


@pytest.mark.parametrize("remove", [True, False])
def test_missing_kv_heads_mean_one_per_query_head(nemotron: Path, remove: bool) -> None:
    if remove:
        edit_config(nemotron, remove=("num_key_value_heads",))
    else:
        edit_config(nemotron, num_key_value_heads=None)
    assert open_checkpoint(nemotron).config.num_kv_heads == 6


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, RopeScaling(kind="linear", factor=4.0)),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            RopeScaling(kind="llama3", factor=8.0, original_context_length=64),
        ),
    ],
)
def test_rope_scaling_of_transformers_4_is_read(
    tmp_path: Path, values: dict[str, Any], expected: RopeScaling
) -> None:
    directory = llama_directory(tmp_path / "m")
    edit_config(directory, remove=("rope_parameters",), **values)
    assert open_checkpoint(directory).config.rope_scaling == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'; readable: nemotron, llama"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope scaling of kind 'longrope'"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0"),
        ({"layer_types": ["sliding_attention"]}, "layer_types is"),
        ({"rope_scaling": {"type": "linear"}}, "no number for factor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'; expected a number"),
        ({"rope_parameters": [1]}, "rope_parameters is .*; expected an object"),
        ({"hidden_size": "48"}, "hidden_size is '48'; expected an integer"),
        ({"num_key_value_heads": 4}, r"num_heads \(6\) is not divisible by num_kv_heads \(4\)"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(
    nemotron: Path, values: dict[str, Any], message: str
) -> None:
    edit_config(nemotron, **values)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(nemotron)
    assert "config.json" in caught.value.message


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_cut_off_file_names_the_tensor_that_it_hurts(nemotron: Path, cut: int) -> None:
    file = nemotron / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'model\..*' is cut off"):
        open_checkpoint(nemotron)


def _with_length(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4,
        b"\xff" * 64,
        b"\x02\x00\x00\x00\x00\x00\x00\x00[]",
        b"\x04" + b"\x00" * 7 + b"}{}{",
        _with_length(b"[" * 200_000),
        _with_length(b'{"a":{"dtype":"F32","shape":[1' + b"0" * 40 + b'],"data_offsets":[0,4]}}'),
        _with_length(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'),
    ],
    ids=[
        "empty",
        "short",
        "huge-header",
        "not-an-object",
        "not-json",
        "deep",
        "absurd-shape",
        "infinite-shape",
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(nemotron: Path, content: bytes) -> None:
    (nemotron / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(nemotron)


def test_a_file_cut_off_after_opening_is_an_error_not_a_crash(nemotron: Path) -> None:
    checkpoint = open_checkpoint(nemotron)
    with (nemotron / "model.safetensors").open("r+b") as handle:
        handle.truncate(4096)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is cut off"):
        checkpoint.read("lm_head.weight")


def test_overlapping_tensors_are_refused(nemotron: Path) -> None:
    file = nemotron / "model.safetensors"
    header = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"})
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(CheckpointError, match="overlaps"):
        open_checkpoint(nemotron)


def test_a_missing_tensor_is_named_with_the_nearest_one_present(nemotron: Path) -> None:
    wrong = torch.zeros(48)
    rewrite_weights(nemotron, model__norm__weight=None, model__final_norm__weight=wrong)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is missing") as caught:
        load_transformer(open_checkpoint(nemotron), dtype=torch.float32)
    assert caught.value.hint == "did you mean 'model.final_norm.weight'?"


def test_a_surplus_tensor_is_named_with_its_file(nemotron: Path) -> None:
    rewrite_weights(nemotron, model__layers__0__mlp__gate_proj__weight=torch.zeros(80, 48))
    with pytest.raises(
        CheckpointError,
        match=r"model\.safetensors: tensor 'model\.layers\.0\.mlp\.gate_proj\.weight' has no place",
    ):
        load_transformer(open_checkpoint(nemotron), dtype=torch.float32)


def test_a_wrong_shape_is_named_with_both_shapes(nemotron: Path) -> None:
    edit_config(nemotron, vocab_size=500)
    with pytest.raises(CheckpointError, match=r"shape \[512, 48\]; the configuration expects \[500, 48\]"):
        load_transformer(open_checkpoint(nemotron), dtype=torch.float32)


def test_rope_frequencies_are_skipped_on_purpose(nemotron: Path) -> None:
    rewrite_weights(nemotron, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    _, report = load_transformer(open_checkpoint(nemotron), dtype=torch.float32)
    assert set(report.skipped) == {"model.layers.0.self_attn.rotary_emb.inv_freq"}


def test_a_second_copy_of_a_tied_weight_must_be_equal(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    rewrite_weights(directory, lm_head__weight=embedding.clone())
    model, report = load_transformer(open_checkpoint(directory), dtype=torch.float32)
    assert report.skipped == {"lm_head.weight": "the same weight as model.embed_tokens.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    rewrite_weights(directory, lm_head__weight=embedding + 1)
    with pytest.raises(
        CheckpointError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"
    ):
        load_transformer(open_checkpoint(directory), dtype=torch.float32)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m", max_shard_size="60KB")
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == shards[0])

    moved = {**index["weight_map"], name: shards[1]}
    index_file.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(CheckpointError, match=r"is missing, although"):
        open_checkpoint(directory)
    index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], name: f"../m/{shards[0]}"}}))
    with pytest.raises(CheckpointError, match="is not a plain file name"):
        open_checkpoint(directory)
    index_file.write_text(json.dumps(index))
    (directory / shards[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{shards[0]}: shard is missing"):
        open_checkpoint(directory)


def test_the_index_decides_over_a_stale_copy_in_another_shard(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m", max_shard_size="60KB")
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.0.mlp.up_proj.weight"
    expected = open_checkpoint(directory).read(name)
    other = directory / next(file for file in weight_map.values() if file != weight_map[name])
    save_file({**load_file(other), name: torch.zeros_like(expected)}, other)
    checkpoint = open_checkpoint(directory)
    assert torch.equal(checkpoint.read(name), expected)
    assert any(f"{other}: {name!r} left out" in note for note in checkpoint.notes)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_git_lfs_pointer_is_named_as_one(nemotron: Path, file: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 5\n"
    (nemotron / file).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"{file}: a Git LFS pointer") as caught:
        open_checkpoint(nemotron)
    assert "git lfs pull" in str(caught.value.hint)


def test_an_activation_may_be_called_swish(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m")
    expected = open_checkpoint(directory).config
    edit_config(directory, hidden_act="swish")
    assert open_checkpoint(directory).config == expected


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"rope_percent": 0.25}, "rope_percent counts"),
        ({"layer_norm_eps": 0.1}, "layer_norm_eps is not used: norm_eps counts"),
        ({"frobnicate": 3}, "not known here and not used: frobnicate"),
        ({"sliding_window": 32}, "sliding_window is not used: a nemotron model attends to everything"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}},
            "finetuned in the RoPE scaling is not known here",
        ),
    ],
)
def test_keys_that_transformers_does_not_read_are_told(
    nemotron: Path, values: dict[str, Any], note: str
) -> None:
    edit_config(nemotron, remove=("rope_parameters",), **values)
    checkpoint = open_checkpoint(nemotron)
    assert any(note in line for line in checkpoint.notes)
    assert checkpoint.config.norm_eps == 1e-5


def test_a_llama_model_rotates_whole_heads_as_in_transformers(tmp_path: Path) -> None:
    directory = llama_directory(tmp_path / "m")
    edit_config(directory, remove=("rope_parameters",), partial_rotary_factor=0.5)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config.rotary_fraction == 1.0
    assert any("partial_rotary_factor is not used" in line for line in checkpoint.notes)
    peer = AutoModelForCausalLM.from_pretrained(directory)
    model, _ = load_transformer(checkpoint, dtype=torch.float32)
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), peer(tokens_BT).logits, atol=1e-4, rtol=1e-4)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    YARN,
    {**YARN, "attention_factor": 1.7, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    {**YARN, "truncate": False},
    {**YARN, "factor": None},
]


@pytest.mark.filterwarnings("ignore")  # transformers' own words about such settings
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("family", BUILDERS)
def test_rope_scaling_gives_the_logits_of_transformers(
    tmp_path: Path, family: str, scaling: dict[str, Any]
) -> None:
    directory = BUILDERS[family](tmp_path / "m")
    factor = {"partial_rotary_factor": 0.5} if family == "nemotron" else {}
    edit_config(directory, remove=("rope_parameters",), rope_scaling=scaling, rope_theta=500.0, **factor)
    peer = AutoModelForCausalLM.from_pretrained(directory)
    model, _ = load_transformer(open_checkpoint(directory), dtype=torch.float32)
    tokens_BT = torch.randint(0, 512, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), peer(tokens_BT).logits, atol=2e-4, rtol=2e-4)


def test_pickled_weights_are_never_loaded(nemotron: Path) -> None:
    (nemotron / "model.safetensors").rename(nemotron / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"Python pickles \(pytorch_model\.bin\)"):
        open_checkpoint(nemotron)


def test_an_unknown_tensor_name_suggests_the_nearest(nemotron: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown tensor") as caught:
        open_checkpoint(nemotron).read("model.norm.weights")
    assert caught.value.hint == "did you mean 'model.norm.weight'?"
