"""Quantised weights of Hugging Face directories, against compressed-tensors' own code and slow loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import (
    NaiveQuantizationCompressor,
    NVFP4PackedCompressor,
    PackedQuantizationCompressor,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.errors import CheckpointError
from tests.tiny_models import llama_directory

NAME = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 96, 64  # of that weight
SHAPE = {"hidden_size": COLUMNS, "intermediate_size": ROWS, "num_attention_heads": 4, "head_dim": 16}


def directory_with(path: Path, parts: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """A Llama directory in which one linear layer is stored as ``parts``, by suffix."""
    folder = llama_directory(path, num_hidden_layers=1, **SHAPE)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{NAME}.weight"]
    tensors |= {f"{NAME}.{suffix}": value.contiguous() for suffix, value in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    return folder


def random_weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def expect(folder: Path, expected: torch.Tensor, word: str) -> None:
    """The whole, rows of it, the table of tensors, and a model that loads."""
    checkpoint = open_checkpoint(folder)
    name = f"{NAME}.weight"
    torch.testing.assert_close(checkpoint.read(name), expected.float(), atol=0, rtol=1e-6)
    for start, stop in ((0, 1), (5, 47), (90, ROWS)):
        assert torch.equal(checkpoint.read_rows(name, start, stop), checkpoint.read(name)[start:stop])
    info = checkpoint.tensors[name]
    stored = load_file(folder / "model.safetensors")
    used = ("weight", "scale", "packed", "shape", "zero", "idx", "qweight", "qzeros")
    parts = {n: t for n, t in stored.items() if n.startswith(NAME) and any(word in n for word in used)}
    parts = {n: t for n, t in parts.items() if "input" not in n}
    assert (info.shape, info.dtype) == ((ROWS, COLUMNS), word)
    assert info.num_bytes == sum(t.numel() * t.element_size() for t in parts.values())
    load_transformer(checkpoint, dtype=torch.float32)


def scheme(**values: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**values))


def compressed_config(form: str, bits: int) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": bits}}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


@pytest.mark.parametrize("grid", [(1, 1), (ROWS, 1), (3, 2), (ROWS, 4)], ids=str)
@pytest.mark.parametrize("kind", ["int", "float"])
def test_eight_bits_with_a_scale_of_any_grid(tmp_path: Path, kind: str, grid: tuple[int, int]) -> None:
    scale = torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.5
    values = (random_weight() * 20).to(torch.int8 if kind == "int" else torch.float8_e4m3fn)
    spread = scale.repeat_interleave(ROWS // grid[0], 0).repeat_interleave(COLUMNS // grid[1], 1)
    parts = {"weight": values, "weight_scale": scale, "input_scale": torch.tensor([2.0])}
    folder = directory_with(tmp_path, parts, compressed_config(f"{kind}-quantized", 8))
    expect(folder, values.float() * spread, "int8" if kind == "int" else "float8_e4m3fn")
    assert any("input_scale" in note for note in open_checkpoint(folder).notes)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
def test_autofp8_and_fine_grained_fp8(tmp_path: Path, suffix: str) -> None:
    grid = () if suffix == "weight_scale" else (3, 2)
    scale = torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.5
    values = random_weight().to(torch.float8_e4m3fn)
    spread = scale
    if grid:
        spread = scale.repeat_interleave(ROWS // 3, 0).repeat_interleave(COLUMNS // 2, 1)
    parts = {"weight": values, suffix: scale, "input_scale": torch.tensor(1.5)}
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    expect(directory_with(tmp_path, parts, config), values.float() * spread, "float8_e4m3fn")


def test_the_last_block_of_fine_grained_fp8_may_be_smaller(tmp_path: Path) -> None:
    scale = torch.rand((3, 2), generator=torch.Generator().manual_seed(1)) + 0.5
    values = random_weight().to(torch.float8_e4m3fn)
    spread = scale.repeat_interleave(40, 0)[:ROWS].repeat_interleave(40, 1)[:, :COLUMNS]
    parts = {"weight": values, "weight_scale_inv": scale}
    config = {"quant_method": "fp8", "weight_block_size": [40, 40]}
    expect(directory_with(tmp_path / "a", parts, config), values.float() * spread, "float8_e4m3fn")
    folder = directory_with(tmp_path / "b", parts | {"weight_scale_inv": torch.ones(5, 1)}, config)
    with pytest.raises(CheckpointError, match=r"the scale of tensor .* has shape \[5, 1\]"):
        open_checkpoint(folder)


def test_a_scale_of_the_layer_s_input_that_changes_the_result_is_not_left_out(tmp_path: Path) -> None:
    parts = {"weight": random_weight().to(torch.float8_e4m3fn), "weight_scale": torch.ones(())}
    parts |= {"pre_quant_scale": torch.ones(COLUMNS)}
    folder = directory_with(tmp_path, parts, {"quant_method": "modelopt", "quant_algo": "FP8"})
    with pytest.raises(CheckpointError, match="pre_quant_scale"):
        load_transformer(open_checkpoint(folder), dtype=torch.float32)


def test_scales_of_the_cache_are_left_out_with_a_note(tmp_path: Path) -> None:
    parts = {"weight": random_weight().to(torch.float8_e4m3fn), "weight_scale": torch.ones(ROWS, 1)}
    folder = directory_with(tmp_path, parts, compressed_config("float-quantized", 8))
    tensors = load_file(folder / "model.safetensors")
    for name in ("k_scale", "v_scale"):
        tensors[f"model.layers.0.self_attn.{name}"] = torch.tensor(0.5)
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert any("2 scales of activations and caches (k_scale, v_scale)" in note for note in checkpoint.notes)
    load_transformer(checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_are_what_compressed_tensors_wrote(
    tmp_path: Path, bits: int, strategy: str, symmetric: bool
) -> None:
    group = {"group_size": 16} if strategy == "group" else {}
    settings = scheme(num_bits=bits, strategy=strategy, symmetric=symmetric, **group)
    num_groups = COLUMNS // 16 if group else 1
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(ROWS, num_groups, generator=generator) / 2**bits + 0.01
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    zero = torch.randint(low, high, (ROWS, num_groups), generator=generator, dtype=torch.int8)
    state = {"weight": random_weight(), "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = zero
    parts = PackedQuantizationCompressor.compress(state, settings)
    expected = PackedQuantizationCompressor.decompress(parts, settings)["weight"]
    expect(directory_with(tmp_path, parts, compressed_config("pack-quantized", bits)), expected, f"int{bits}")


def test_asymmetric_eight_bits(tmp_path: Path) -> None:
    settings = scheme(num_bits=8, strategy="channel", symmetric=False)
    scale = torch.full((ROWS, 1), 0.02)
    zero = torch.randint(-20, 20, (ROWS, 1), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    state = {"weight": random_weight(), "weight_scale": scale, "weight_zero_point": zero}
    parts = NaiveQuantizationCompressor.compress(state, settings)
    expected = NaiveQuantizationCompressor.decompress(parts, settings)["weight"]
    expect(directory_with(tmp_path, parts, compressed_config("int-quantized", 8)), expected, "int8")


def nvfp4_parts() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    settings = scheme(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    weight = random_weight()
    whole = torch.tensor([448.0 * 6 / float(weight.abs().max())])
    scale = (weight.view(ROWS, -1, 16).abs().amax(2) / 6 * whole).to(torch.float8_e4m3fn)
    state = {"weight": weight, "weight_scale": scale.float(), "weight_global_scale": whole}
    parts = NVFP4PackedCompressor.compress(state, settings)
    values = NVFP4PackedCompressor.decompress(parts, settings)["weight"]
    assert float((values - weight).norm() / weight.norm()) < 0.15
    low, high = parts["weight_packed"] & 15, parts["weight_packed"] >> 4
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    exact = torch.tensor(table)[torch.stack((low, high), -1).flatten(1).long()]
    return parts, exact * (scale.float() / whole).repeat_interleave(16, 1)


def test_nvfp4_of_compressed_tensors(tmp_path: Path) -> None:
    parts, expected = nvfp4_parts()
    expect(directory_with(tmp_path, parts, compressed_config("nvfp4-pack-quantized", 4)), expected, "nvfp4")


def test_nvfp4_of_modelopt_multiplies_by_its_second_scale(tmp_path: Path) -> None:
    parts, expected = nvfp4_parts()
    parts = {
        "weight": parts["weight_packed"],
        "weight_scale": parts["weight_scale"],
        "weight_scale_2": 1 / parts["weight_global_scale"].squeeze(),
        "input_scale": torch.tensor(1.0),
    }
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    expect(directory_with(tmp_path, parts, config), expected, "nvfp4")


def nibbles(values: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Eight values of 4 bits to an int32, value ``order[i]`` at nibble i."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for place, which in enumerate(order):
        words |= values[:, which::8].long() << 4 * place
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("is_ordered", [True, False])
def test_gptq(tmp_path: Path, form: str, is_ordered: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    values_CR = torch.randint(0, 16, (COLUMNS, ROWS), generator=generator)
    zero_GR = torch.randint(1, 16, (4, ROWS), generator=generator)
    scale_GR = torch.rand(4, ROWS, generator=generator).half()
    group_C = torch.arange(COLUMNS) // 16
    if not is_ordered:  # "act order": a column's group is anything
        group_C = group_C[torch.randperm(COLUMNS, generator=generator)]
    plain = list(range(8))
    parts = {
        "qweight": nibbles(values_CR.T, plain).T,
        "qzeros": nibbles(zero_GR - int(form == "gptq"), plain),
        "scales": scale_GR,
        "g_idx": group_C.to(torch.int32),
    }
    expected = torch.empty(ROWS, COLUMNS)
    for c in range(COLUMNS):
        expected[:, c] = (values_CR[c] - zero_GR[group_C[c]]) * scale_GR[group_C[c]].float()
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": form}
    expect(directory_with(tmp_path, parts, config), expected, "int4")


def test_awq(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    values_CR = torch.randint(0, 16, (COLUMNS, ROWS), generator=generator)
    zero_GR = torch.randint(0, 16, (4, ROWS), generator=generator)
    scale_GR = torch.rand(4, ROWS, generator=generator).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's order_map
    parts = {"qweight": nibbles(values_CR, order), "qzeros": nibbles(zero_GR, order), "scales": scale_GR}
    expected = torch.empty(ROWS, COLUMNS)
    for c in range(COLUMNS):
        expected[:, c] = (values_CR[c] - zero_GR[c // 16]) * scale_GR[c // 16].float()
    config = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    expect(directory_with(tmp_path, parts, config), expected, "int4")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantised \(bitsandbytes\)"),
        (compressed_config("marlin-24", 4), "packed as 'marlin-24'"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt W4A8_AWQ"),
        ({"quant_method": "hqq"}, r"quantised \(hqq\)"),
    ],
)
def test_what_cannot_be_expanded_opens_and_is_named_before_a_weight_is_read(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = directory_with(tmp_path, {"weight": torch.zeros(7, dtype=torch.uint8)}, config)
    checkpoint = open_checkpoint(folder)  # vLLM needs the shape and the tokenizer
    assert checkpoint.config.hidden_size == COLUMNS
    with pytest.raises(CheckpointError, match=message) as caught:
        load_transformer(checkpoint, dtype=torch.float32)
    assert "--engine vllm" in str(caught.value.hint)


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    parts = {"weight": random_weight().to(torch.int8)}
    folder = directory_with(tmp_path, parts, compressed_config("int-quantized", 8))
    with pytest.raises(CheckpointError, match=r"scale of tensor .*up_proj\.weight' is missing"):
        open_checkpoint(folder)
