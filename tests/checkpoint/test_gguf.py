"""GGUF files that the ``gguf`` package wrote: values against its own, models against the source directory."""

from __future__ import annotations

from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize as gguf_dequantize
from transformers import AutoModelForCausalLM

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.gguf_file import GgufTensor, dequantize, read_gguf
from nemotron4.checkpoint.interface import float_rows
from nemotron4.checkpoint.load import load_transformer
from nemotron4.errors import CheckpointError
from nemotron4.model.config import RopeScaling
from tests.checkpoint.gguf_files import gguf_name, write_gguf
from tests.tiny_models import llama_directory, nemotron_directory

BUILDERS = {"nemotron": nemotron_directory, "llama": llama_directory}
# Rows are multiples of 32, the block of the simple quantised kinds.
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4}


@pytest.fixture
def nemotron(tmp_path: Path) -> Path:
    return nemotron_directory(tmp_path / "nemotron")


def test_a_tensor_of_several_steps_equals_gguf_bit_for_bit() -> None:
    # More values than one step takes, and not a multiple of it.
    values = np.random.default_rng(0).standard_normal((67, 1024), dtype=np.float32)
    raw = gguf.quants.quantize(values, Kind.Q8_0)
    tensor = GgufTensor("w", values.shape, Kind.Q8_0, 0, raw.size, Path("w.gguf"))
    found = dequantize(torch.from_numpy(raw.reshape(-1)), tensor, torch.float16)
    assert torch.equal(found, torch.from_numpy(gguf_dequantize(raw, Kind.Q8_0)).half())


@pytest.mark.parametrize("family", BUILDERS)
def test_a_float_file_gives_the_logits_of_its_source(tmp_path: Path, family: str) -> None:
    source = BUILDERS[family](tmp_path / family)
    file = write_gguf(source, tmp_path / f"{family}.gguf")
    peer = AutoModelForCausalLM.from_pretrained(source)
    model, report = load_transformer(open_checkpoint(file), dtype=torch.float32)
    tokens_BT = torch.randint(0, 512, (2, 31), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), peer(tokens_BT).logits, atol=1e-4, rtol=1e-4)
    assert set(report.loaded) | report.skipped.keys() == set(model.state_dict())


@pytest.mark.parametrize("family", BUILDERS)
def test_transformers_own_gguf_reader_gives_the_same_logits(tmp_path: Path, family: str) -> None:
    # It reads head_dim as hidden / heads, hence 8.
    source = BUILDERS[family](tmp_path / family, head_dim=8)
    file = write_gguf(source, tmp_path / "m.gguf")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    model, _ = load_transformer(open_checkpoint(file), dtype=torch.float32)
    tokens_BT = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), peer(tokens_BT).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", BUILDERS)
def test_the_configuration_equals_that_of_the_source(tmp_path: Path, family: str) -> None:
    source = BUILDERS[family](tmp_path / family, rope_theta=5000.0)
    expected = open_checkpoint(source).config
    found = open_checkpoint(write_gguf(source, tmp_path / "m.gguf")).config
    assert {**vars(found), "init_std": 0} == {**vars(expected), "init_std": 0}  # GGUF has no init_std


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
@pytest.mark.parametrize("family", BUILDERS)
def test_every_stored_tensor_equals_what_gguf_itself_reads(tmp_path: Path, family: str, kind: Kind) -> None:
    source = BUILDERS[family](tmp_path / family, num_hidden_layers=1, **SHAPE)
    file = write_gguf(source, tmp_path / "m.gguf", kind)
    stored = {
        tensor.name: gguf_dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(file).tensors
    }
    checkpoint = open_checkpoint(file)
    assert len(checkpoint.tensors) == len(stored)
    for name, info in checkpoint.tensors.items():
        expected = stored[gguf_name(name)]
        if family == "nemotron" and name.endswith("norm.weight"):
            expected = expected - 1
        if family == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            num_heads = 4 if "q_proj" in name else 2
            pairs = expected.reshape(num_heads, -1, 2, expected.shape[-1])
            expected = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(expected.shape)
        assert info.dtype == ("F32" if expected.ndim == 1 else kind.name)
        np.testing.assert_array_equal(checkpoint.read(name).float().numpy(), expected, err_msg=name)


@pytest.mark.parametrize("family", BUILDERS)
def test_stored_blocks_dequantise_to_what_is_read(tmp_path: Path, family: str) -> None:
    source = BUILDERS[family](tmp_path / family, num_hidden_layers=1, **SHAPE)
    checkpoint = open_checkpoint(write_gguf(source, tmp_path / "m.gguf", Kind.Q4_1))
    for name, info in checkpoint.tensors.items():
        raw = checkpoint.raw_tensor(name)
        assert raw is not None
        expected = checkpoint.read(name).numpy()
        if len(info.shape) == 1:
            assert (raw.kind, raw.shape) == ("F32", info.shape)
            np.testing.assert_array_equal(float_rows(checkpoint, name, 0, info.shape[0]), expected)
            continue
        assert (raw.kind, raw.shape) == ("Q4_1", info.shape)
        part = checkpoint.raw_tensor(name, 3, 21)
        assert part is not None
        np.testing.assert_array_equal(part.data_RX, raw.data_RX[3:21], err_msg=name)
        np.testing.assert_array_equal(gguf_dequantize(raw.data_RX, Kind[raw.kind]), expected, err_msg=name)


@pytest.mark.parametrize(
    "kind",
    [
        *(Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1),
        *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # random scales overflow in gguf's own code
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_random_blocks_equal_gguf_bit_for_bit(kind: Kind) -> None:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (24, 4 * block_bytes), dtype=np.uint8)
    tensor = GgufTensor("w", (24, 4 * block), kind, 0, raw.size, Path("w.gguf"))
    expected = gguf_dequantize(raw, kind)
    data = torch.from_numpy(raw.reshape(-1))
    np.testing.assert_array_equal(dequantize(data, tensor).numpy(), expected)
    rounded = torch.from_numpy(expected).to(torch.bfloat16)
    assert torch.equal(dequantize(data, tensor, torch.bfloat16).nan_to_num(7), rounded.nan_to_num(7))


def test_metadata_equals_what_gguf_itself_reads(nemotron: Path, tmp_path: Path) -> None:
    file = write_gguf(nemotron, tmp_path / "m.gguf", tokenizer__ggml__add_bos_token=True)
    fields = gguf.GGUFReader(file).fields
    expected = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    assert read_gguf(file).metadata == expected


def test_heads_that_do_not_fill_the_hidden_size_rotate_half(tmp_path: Path) -> None:
    # The converter's formula int(0.5 * hidden) // heads gives 48 // 2 // 6 = 4, where 8 of 16 dims rotate.
    source = nemotron_directory(tmp_path / "m")
    file = write_gguf(source, tmp_path / "m.gguf", nemotron__rope__dimension_count=4)
    assert open_checkpoint(file).config.rotary_dim == 8


def test_head_dim_is_read_from_the_weights_where_the_file_is_silent(nemotron: Path, tmp_path: Path) -> None:
    silent = {"nemotron__attention__key_length": None, "nemotron__attention__value_length": None}
    assert open_checkpoint(write_gguf(nemotron, tmp_path / "m.gguf", **silent)).config.head_dim == 16


def test_equal_numbers_for_each_layer_and_a_float_context_are_read(nemotron: Path, tmp_path: Path) -> None:
    expected = open_checkpoint(nemotron).config
    odd = {
        "nemotron__attention__head_count": [6, 6],
        "nemotron__attention__head_count_kv": [2, 2],
        "nemotron__feed_forward_length": [80, 80],
        "nemotron__context_length": 256.0,
    }
    found = open_checkpoint(write_gguf(nemotron, tmp_path / "m.gguf", **odd)).config
    assert {**vars(found), "init_std": 0} == {**vars(expected), "init_std": 0}
    with pytest.raises(CheckpointError, match=r"head_count_kv is \[2, 6\]; expected a number"):
        open_checkpoint(write_gguf(nemotron, tmp_path / "n.gguf", nemotron__attention__head_count_kv=[2, 6]))


def test_yarn_is_read(nemotron: Path, tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "attn_factor": 1.5}
    keys = {f"nemotron__rope__scaling__{key}": value for key, value in scaling.items()}
    found = open_checkpoint(write_gguf(nemotron, tmp_path / "m.gguf", **keys)).config.rope_scaling
    assert found is not None
    assert (found.kind, found.factor, found.original_context_length) == ("yarn", 4.0, 64)
    assert found.attention_factor == pytest.approx(1.5 * (0.1 * np.log(4) + 1))


def test_linear_rope_scaling_is_read(nemotron: Path, tmp_path: Path) -> None:
    scaling = {"nemotron__rope__scaling__type": "linear", "nemotron__rope__scaling__factor": 4.0}
    file = write_gguf(nemotron, tmp_path / "m.gguf", **scaling)
    assert open_checkpoint(file).config.rope_scaling == RopeScaling(kind="linear", factor=4.0)


@pytest.mark.parametrize("key", ["scaling__factor", "scale_linear"])
def test_a_rope_factor_without_a_type_is_linear_as_in_llama_cpp(
    nemotron: Path, tmp_path: Path, key: str
) -> None:
    for factor, expected in ((4.0, RopeScaling(kind="linear", factor=4.0)), (1.0, None)):
        file = write_gguf(nemotron, tmp_path / f"{factor}.gguf", **{f"nemotron__rope__{key}": factor})
        assert open_checkpoint(file).config.rope_scaling == expected


def test_stored_rope_factors_give_the_logits_of_llama3_scaling(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = llama_directory(tmp_path / "m", head_dim=16, rope_parameters=rope)
    checkpoint = open_checkpoint(write_gguf(source, tmp_path / "m.gguf"))
    factors = checkpoint.config.rope_scaling.factors
    assert factors[0] == 1
    assert factors[-1] == 8
    model, report = load_transformer(checkpoint, dtype=torch.float32)
    assert "rope_freqs.weight" not in {*report.loaded, *report.skipped}
    tokens = torch.arange(3, 203)[None]
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general__architecture": "gemma"}, "architecture is 'gemma'; readable: nemotron, llama"),
        ({"nemotron__block_count": None}, "nemotron.block_count is None; expected a number"),
        ({"nemotron__expert_count": 8}, "expert_count is 8; expected a dense model"),
        ({"nemotron__rope__scaling__type": "longrope"}, "RoPE scaling of kind 'longrope'"),
        ({"nemotron__attention__head_count_kv": 4}, r"num_heads \(6\) is not divisible"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused(
    nemotron: Path, tmp_path: Path, metadata: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_gguf(nemotron, tmp_path / "m.gguf", **metadata))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.999])
def test_a_cut_off_file_is_refused_when_opened(nemotron: Path, tmp_path: Path, share: float) -> None:
    whole = write_gguf(nemotron, tmp_path / "m.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        open_checkpoint(file)


def test_the_cut_off_tensor_is_named(nemotron: Path, tmp_path: Path) -> None:
    file = write_gguf(nemotron, tmp_path / "m.gguf")
    last = gguf.GGUFReader(file).tensors[-1].name
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 64)
    with pytest.raises(CheckpointError, match=f"tensor '{last}' is cut off"):
        open_checkpoint(file)


@pytest.mark.parametrize("position", [0, 4, 8, 16, 24, 32, 60, 120, 200])
def test_damaged_headers_are_explained_errors(nemotron: Path, tmp_path: Path, position: int) -> None:
    content = bytearray(write_gguf(nemotron, tmp_path / "m.gguf").read_bytes())
    content[position : position + 8] = b"\xff" * 8
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        open_checkpoint(tmp_path / "m.gguf")


def test_q_rows_that_are_no_whole_heads_are_refused(tmp_path: Path) -> None:
    source = llama_directory(tmp_path / "m")
    lengths = {"llama__attention__key_length": 16, "llama__attention__value_length": 16}
    file = write_gguf(source, tmp_path / "m.gguf", **lengths, llama__rope__dimension_count=16)
    with pytest.raises(CheckpointError, match="has 48 rows; expected 6 heads of 16"):
        open_checkpoint(file).read("model.layers.0.self_attn.q_proj.weight")


def test_a_fractional_count_is_refused(nemotron: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nemotron\.block_count is 1\.5; expected an integer"):
        open_checkpoint(write_gguf(nemotron, tmp_path / "m.gguf", nemotron__block_count=1.5))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    source = nemotron_directory(tmp_path / "m")
    file = write_gguf(source, tmp_path / "m.gguf", nemotron__block_count=3)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.2\.input_layernorm\.weight' is missing"):
        load_transformer(open_checkpoint(file), dtype=torch.float32)
