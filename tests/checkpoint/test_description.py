"""One description of a checkpoint from its headers, and what plan, launch and doctor make of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.convert import ConvertOptions, convert
from nemotron4.checkpoint.description import describe_checkpoint
from nemotron4.checkpoint.write_huggingface import config_json
from nemotron4.cli.main import main
from nemotron4.cluster.sizes import tensor_sizes
from nemotron4.model.config import ModelConfig
from nemotron4.model.presets import nemotron4_340b
from tests.checkpoint.gguf_files import write_gguf
from tests.tiny_models import llama_directory, nemotron_directory, sentencepiece_model

LLAMA_70B = ModelConfig(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    context_length=131072,
    norm="rmsnorm",
    mlp="swiglu",
    rotary_fraction=1.0,
)


def sparse_directory(folder: Path, config: ModelConfig, *, is_fp8: bool) -> Path:
    """The files of a large model with headers as ``convert`` writes them, and holes in place of weights."""
    folder.mkdir()
    header: dict[str, Any] = {}
    position = 0

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        nonlocal position
        size = math.prod(shape) * (1 if dtype == "F8_E4M3" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size

    for tensor in tensor_sizes(config):
        is_packed = is_fp8 and tensor.is_linear
        add(tensor.name, "F8_E4M3" if is_packed else "BF16", tensor.shape)
        if is_packed:
            add(f"{tensor.name}_scale", "BF16", (tensor.shape[0], 1))
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    values = config_json(config, dtype=torch.bfloat16)
    if is_fp8:
        groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}
        entry = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}
        values["quantization_config"] = entry
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


def test_the_fp8_340b_fits_one_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sparse_directory(tmp_path / "340b-fp8", nemotron4_340b(), is_fp8=True)
    found = describe_checkpoint(folder)
    assert found.planned_dtype == "fp8"
    assert found.stored_bytes < 355e9
    assert sum(found.served_bytes.values()) == found.stored_bytes
    assert main(["plan", str(folder), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["num_gpus"], plan["dtype"]) == (8, "fp8")
    assert sum(plan["weight_bytes"].values()) == found.stored_bytes
    arguments = ["launch", "slurm", str(folder), "--nodes", "1", "--gpus-per-node", "8", "--gpu", "h100-80gb"]
    assert main(arguments) == 0
    assert "--tensor-parallel 8" in capsys.readouterr().out


def test_one_context_for_plan_and_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sparse_directory(tmp_path / "70b", LLAMA_70B, is_fp8=False)
    launch = ["launch", "slurm", str(folder), "--gpus-per-node", "2", "--gpu", "h100-80gb"]
    assert main(launch) == 1
    assert "with 131072 tokens does not fit 2 x h100-80gb" in capsys.readouterr().err
    assert main([*launch, "--context", "4096"]) == 0
    assert f"serve {folder} --host 0.0.0.0 --port 1424 --context 4096" in capsys.readouterr().out
    plan = ["plan", str(folder), "--concurrency", "1", "--json"]
    assert main(plan) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 131072
    assert main([*plan, "--context", "4096"]) == 0
    assert json.loads(capsys.readouterr().out)["num_gpus"] == 2


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_stored_and_served_bytes_are_the_file_s(tmp_path: Path, scheme: Any) -> None:
    source = open_checkpoint(nemotron_directory(tmp_path / "m", dtype=torch.bfloat16))
    convert(source, tmp_path / "q", ConvertOptions(to="hf", quantize=scheme))
    found = describe_checkpoint(tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert found.stored_bytes == sum(found.served_bytes.values()) == file.stat().st_size - 8 - header
    assert found.problems == ()


def test_a_gguf_model_is_expanded_to_16_bits_on_gpus(tmp_path: Path) -> None:
    import gguf

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    source = llama_directory(tmp_path / "m", **shape)
    file = write_gguf(source, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_0)
    found = describe_checkpoint(file)
    assert sum(found.served_bytes.values()) == 2 * found.config.num_parameters
    assert found.stored_bytes < found.config.num_parameters
    assert (found.planned_dtype, next(iter(found.stored_types))) == ("bf16", "Q4_0")


def test_engine_page_and_convert_show_the_one_description(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = nemotron_directory(tmp_path / "m")
    summary = describe_checkpoint(folder).summary
    assert summary == "huggingface, 89,568 parameters stored as float32 0.000 GB"
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "hf", "--quantize", "fp8"]) == 0
    assert f"{folder}: {summary}" in capsys.readouterr().err
    with nemotron4.load(tmp_path / "out") as engine:
        info = engine.info
    assert info.checkpoint == describe_checkpoint(tmp_path / "out").summary
    assert info.checkpoint.endswith(", quantised (compressed-tensors)")


def test_doctor_describes_a_healthy_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nemotron_directory(tmp_path / "m")
    assert main(["doctor", "checkpoint", str(folder), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["problems"] == []
    assert values["stop_ids"] == [3, 5]
    assert values["smallest_hardware"] == "1 x h100-80gb"
    assert main(["doctor", "checkpoint", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "float32" in text
    assert "has no chat template" in text


def _without_up_projection(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def _with_stop_id_900(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 900]}))


def _with_a_template_that_does_not_parse(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")


def _of_bitsandbytes(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_without_up_projection, "'model.layers.1.mlp.up_proj.weight' is missing"),
        (_with_stop_id_900, "stop id 900"),
        (_with_a_template_that_does_not_parse, "template"),
        (_of_bitsandbytes, "quantised (bitsandbytes)"),
    ],
)
def test_doctor_names_what_would_go_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Any, problem: str
) -> None:
    folder = nemotron_directory(tmp_path / "m")
    damage(folder)
    assert main(["doctor", "checkpoint", str(folder)]) == 1
    assert problem in capsys.readouterr().out
