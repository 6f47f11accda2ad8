"""Four bits and static eight bits, against the code of compressed-tensors, gguf and, if set, llama.cpp."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import NVFP4PackedCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from gguf.constants import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from nemotron4.checkpoint.convert import ConvertOptions, convert, verify
from nemotron4.checkpoint.description import describe_checkpoint
from nemotron4.checkpoint.gguf_quantize import kind_for, quantize_blocks
from nemotron4.checkpoint.load import load_transformer
from nemotron4.checkpoint.opening import open_checkpoint
from nemotron4.checkpoint.write_quantized import (
    calibration_tokens,
    measure_inputs,
    quantize_int4,
    quantize_nvfp4,
)
from nemotron4.errors import CheckpointError, ConfigError
from tests.checkpoint.gguf_files import write_gguf
from tests.tiny_models import llama_directory, nemotron_directory

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
TOKENS_BT = torch.arange(40).view(2, 20) * 7 % 512


def weights(rows: int = 64, columns: int = 512) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def written(tmp_path: Path, make: Any = nemotron_directory, **options: Any) -> tuple[Path, dict[str, Any]]:
    source = open_checkpoint(make(tmp_path / "m", **SHAPE, dtype=torch.bfloat16))
    finished = convert(source, tmp_path / "q", ConvertOptions(**options))
    return tmp_path / "q", {name: value for row in finished for name, value in row.facts.items()}


def relative_error_of_logits(source: Path, found: Path) -> float:
    models = [load_transformer(open_checkpoint(path), dtype=torch.float32)[0] for path in (source, found)]
    with torch.no_grad():
        expected, actual = (model(TOKENS_BT) for model in models)
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("scheme", "bound", "bits"), [("int4", 0.12, 4.13), ("nvfp4", 0.12, 4.51)])
@pytest.mark.parametrize("make", [nemotron_directory, llama_directory])
def test_four_bits_are_read_back_with_the_error_they_state(
    tmp_path: Path, make: Any, scheme: Any, bound: float, bits: float
) -> None:
    folder, facts = written(tmp_path, make, to="hf", quantize=scheme)
    source, found = open_checkpoint(tmp_path / "m"), open_checkpoint(folder)
    assert found.tensors.keys() == source.tensors.keys()
    linear = [name for name in source.tensors if name.endswith("_proj.weight")]
    assert set(facts) == set(linear)
    for name in linear:
        weight, restored = source.read(name).float(), found.read(name).float()
        error = float((restored - weight).norm() / weight.norm())
        assert facts[name]["relative_error"] == pytest.approx(error, rel=1e-3)
        assert error < bound
        assert 8 * found.tensors[name].num_bytes < bits * weight.numel() + 200
    assert describe_checkpoint(folder).planned_dtype == scheme
    assert verify(source, folder, ConvertOptions(to="hf", quantize=scheme)) > 0


def test_rows_of_different_lengths_share_one_group_size(tmp_path: Path) -> None:
    """The demo model has rows of 576 and 1,536 values."""
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 3, "num_key_value_heads": 1}
    source = open_checkpoint(llama_directory(tmp_path / "m", head_dim=64, **shape))
    convert(source, tmp_path / "q", ConvertOptions(to="hf", quantize="int4"))
    entry = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert entry["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert relative_error_of_logits(tmp_path / "m", tmp_path / "q") < 0.5


@pytest.mark.parametrize(
    ("scheme", "compressor"), [("int4", PackedQuantizationCompressor), ("nvfp4", NVFP4PackedCompressor)]
)
def test_compressed_tensors_reads_the_same_values(tmp_path: Path, scheme: Any, compressor: Any) -> None:
    folder, _ = written(tmp_path, to="hf", quantize=scheme)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (scheme == "int4") == (entry["format"] == "pack-quantized")
    settings = QuantizationConfig.model_validate(entry).config_groups["group_0"]
    stored, found = load_file(folder / "model.safetensors"), open_checkpoint(folder)
    for name in (n for n in found.tensors if n.endswith("_proj.weight")):
        stem = name.removesuffix("weight")
        parts = {key.removeprefix(stem): value for key, value in stored.items() if key.startswith(stem)}
        expected = compressor.decompress(parts, settings)["weight"].float()
        torch.testing.assert_close(found.read(name), expected, atol=0, rtol=0.01)  # it computes in bfloat16


def test_nvfp4_codes_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.quantization import preset_name_to_scheme

    weight = weights()
    whole = float(torch.tensor(448 * 6 / float(weight.abs().max())))
    part = quantize_nvfp4(weight, whole=whole)
    state = {
        "weight": weight,
        "weight_scale": part.scale.float(),
        "weight_global_scale": torch.tensor([whole]),
    }
    peer = NVFP4PackedCompressor.compress(state, preset_name_to_scheme("NVFP4A16", ["Linear"]))
    assert torch.equal(part.values, peer["weight_packed"])


def test_layers_that_vllm_joins_share_nvfp4_s_factor(tmp_path: Path) -> None:
    folder, _ = written(tmp_path, llama_directory, to="hf", quantize="nvfp4")
    stored = load_file(folder / "model.safetensors")
    factors = {name: float(t) for name, t in stored.items() if name.endswith("weight_global_scale")}
    q, k, v = (factors[f"model.layers.0.self_attn.{n}_proj.weight_global_scale"] for n in "qkv")
    assert q == k == v != factors["model.layers.0.self_attn.o_proj.weight_global_scale"]


def test_the_best_of_a_few_scales_is_better_than_the_largest_value_s() -> None:
    weight = weights()
    part = quantize_int4(weight, group=128, scale_dtype=torch.float32)
    plain = weight.unflatten(1, (-1, 128))
    scale = plain.abs().amax(2, keepdim=True) / 7.5
    plain_error = ((plain / scale).round().clamp(-8, 7) * scale - plain).norm()
    assert (part.restored_RC - weight).norm() < 0.97 * plain_error


@pytest.mark.parametrize("scheme", ["int4", "nvfp4"])
def test_with_texts_columns_count_by_their_inputs(tmp_path: Path, scheme: Any) -> None:
    """The error of what comes out of the layers is smaller; int4 gives up some of the weights' for it."""
    texts = tmp_path / "texts.txt"
    texts.write_text("Shall I compare thee to a summer's day?\n\nThou art more lovely.\n\ndef add(a, b):\n")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    source = open_checkpoint(nemotron_directory(tmp_path / "m", **shape, dtype=torch.bfloat16))
    inputs = measure_inputs(source, calibration_tokens(texts, source))
    errors = {}
    for calibration in (None, texts):
        folder = tmp_path / f"q{calibration is not None}"
        convert(source, folder, ConvertOptions(to="hf", quantize=scheme, calibration=calibration))
        made = open_checkpoint(folder)
        of_weights = of_outputs = 0.0
        for name, found in inputs.items():
            error = made.read(f"{name}.weight").float() - source.read(f"{name}.weight").float()
            of_weights += float(error.square().sum())
            of_outputs += float((error.square() * found.squares_C).sum())
        errors[calibration] = (of_weights, of_outputs)
    assert errors[texts][1] < errors[None][1]
    assert (errors[texts][0] > errors[None][0]) == (scheme == "int4")


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(2, 64)
    assert not quantize_int4(zeros, group=32, scale_dtype=torch.bfloat16).restored_RC.any()
    assert not quantize_nvfp4(zeros, whole=1.0).restored_RC.any()


def test_static_scales_are_the_largest_inputs_of_the_layers(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Shall I compare thee to a summer's day?\n\nThou art more lovely.\n\ndef add(a, b):\n")
    folder, facts = written(tmp_path, to="hf", quantize="fp8-static", calibration=texts)
    source = open_checkpoint(tmp_path / "m")
    model, _ = load_transformer(source, dtype=torch.float32)
    largest: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(note(name))
    with torch.no_grad():
        for part in texts.read_text().split("\n\n"):
            model(torch.tensor([source.tokenizer().encode(part)]))
    stored = load_file(folder / "model.safetensors")
    end = ".input_scale"
    scales = {name.removesuffix(end): float(t) for name, t in stored.items() if name.endswith(end)}
    assert scales == pytest.approx({name: value / 448 for name, value in largest.items()}, rel=1e-5)
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    inputs = entry["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["dynamic"]) == ("tensor", False)
    assert set(facts) == {f"{name}.weight" for name in largest}
    load_transformer(open_checkpoint(folder), dtype=torch.float32)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_0, Kind.Q4_K, Kind.Q6_K])
def test_gguf_reads_the_blocks_as_they_were_meant(kind: Kind) -> None:
    bounds = {"Q8_0": 0.006, "Q4_0": 0.09, "Q5_0": 0.045, "Q4_K": 0.074, "Q6_K": 0.019}
    weight = weights()
    data, restored = quantize_blocks(weight, kind)
    assert np.array_equal(gguf.quants.dequantize(data, kind), restored.numpy())
    assert float((restored - weight).norm() / weight.norm()) < bounds[kind.name]


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K])
def test_k_quants_of_odd_blocks(kind: Kind) -> None:
    zeros = torch.zeros(1, 256)
    steps = zeros.clone()
    steps[0, :32], steps[0, 64:96] = -1.0, 2.0
    for values in (zeros, steps, torch.full((1, 256), 0.5)):
        assert float((quantize_blocks(values, kind)[1] - values).abs().max()) < 2e-3


@pytest.mark.skipif("NEMOTRON4_LIBGGML" not in os.environ, reason="needs llama.cpp's libggml-base.so")
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_K, Kind.Q6_K])
def test_the_blocks_are_llama_cpp_s_within_its_rounding(kind: Kind) -> None:
    library = ctypes.CDLL(os.environ["NEMOTRON4_LIBGGML"])
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    weight = weights(256, 1024).contiguous()
    ours, restored = quantize_blocks(weight, kind)
    theirs = np.zeros_like(ours)
    rows, columns = (ctypes.c_int64(n) for n in weight.shape)
    library.ggml_quantize_chunk(
        ctypes.c_int(kind.value), ctypes.c_void_p(weight.data_ptr()), theirs.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0), rows, columns, None,
    )  # fmt: skip
    peer = torch.from_numpy(gguf.quants.dequantize(theirs, kind))
    assert float((ours == theirs).mean()) > 0.99
    assert float((restored - weight).norm()) == pytest.approx(float((peer - weight).norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("scheme", "bound"), [("q8_0", 0.05), ("q6_k", 0.15), ("q4_k_m", 0.5), ("q4_0", 0.7)]
)
def test_a_quantised_gguf_file_speaks_like_its_source(tmp_path: Path, scheme: Any, bound: float) -> None:
    folder, facts = written(tmp_path, to="gguf", quantize=scheme)
    assert relative_error_of_logits(tmp_path / "m", folder) < bound
    assert all(value["relative_error"] < 0.1 for value in facts.values())
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    assert fields["general.quantization_version"].contents() == 2
    tensors = gguf.GGUFReader(folder / "model.gguf").tensors
    types = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert types["output.weight"] == ("Q8_0" if scheme == "q8_0" else "Q6_K")
    assert types["blk.0.attn_norm.weight"] == "F32"
    if scheme == "q4_k_m":
        assert types["blk.0.attn_q.weight"] == "Q4_K"
        assert "Q6_K" in {types[f"blk.{i}.ffn_down.weight"] for i in range(2)}


def test_a_llama_gguf_is_quantised_anew_with_its_vocabulary(tmp_path: Path) -> None:
    source = write_gguf(llama_directory(tmp_path / "m", **SHAPE), tmp_path / "m.gguf", Kind.F16)
    convert(open_checkpoint(source), tmp_path / "q", ConvertOptions(to="gguf", quantize="q8_0"))
    assert relative_error_of_logits(source, tmp_path / "q") < 0.02
    opened, expected = open_checkpoint(tmp_path / "q"), open_checkpoint(source)
    assert opened.config == expected.config
    assert opened.tokenizer().encode("Shall I?") == expected.tokenizer().encode("Shall I?")
    assert opened.eos_token_ids == expected.eos_token_ids


def test_rows_that_no_k_quant_fills_get_llama_cpp_s_replacement() -> None:
    assert [kind_for(kind, 96) for kind in (Kind.Q4_K, Kind.Q6_K)] == [Kind.Q5_0, Kind.Q8_0]
    assert kind_for(Kind.Q4_K, 512) is Kind.Q4_K
    assert kind_for(Kind.Q8_0, 50) is Kind.F16


def test_schemes_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--to gguf q8_0"):
        ConvertOptions(to="gguf", quantize="int8")
    with pytest.raises(ConfigError, match="--to hf takes"):
        ConvertOptions(to="hf", quantize="q4_k_m")
    with pytest.raises(ConfigError, match="needs texts"):
        ConvertOptions(to="hf", quantize="fp8-static")
    source = open_checkpoint(nemotron_directory(tmp_path / "m"))
    with pytest.raises(CheckpointError, match="values do not divide into groups"):
        convert(source, tmp_path / "q", ConvertOptions(to="hf", quantize="int4"))
