"""What vLLM is told about a checkpoint, without vLLM."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.engine import ModelInfo
from nemotron4.errors import CheckpointError, ConfigError, Nemotron4Error
from nemotron4.inference import sent_weights
from nemotron4.inference.fake_tokenizer import FakeTokenizer
from nemotron4.inference.sent_weights import SentWeights
from nemotron4.inference.vllm_engine import VllmEngine
from nemotron4.inference.vllm_load import Layout, Limits, _settings
from tests.tiny_models import llama_directory, nemotron_directory


def settings(folder: Path, work: Path, **limits: Any) -> dict[str, Any]:
    limit = Limits(max_running=8, **limits)
    checkpoint = open_checkpoint(folder)
    return _settings(checkpoint, Layout(), torch.device("cuda"), torch.bfloat16, None, limit, work)


@pytest.mark.parametrize(
    "method", ["awq", "gptq", "fp8", "modelopt", "bitsandbytes", "compressed-tensors", "anything"]
)
def test_a_quantised_directory_goes_to_vllm_as_it_is(tmp_path: Path, method: str) -> None:
    folder = nemotron_directory(tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": method, "bits": 4, "format": "pack-quantized"}
    (folder / "config.json").write_text(json.dumps(values))
    found = settings(folder, tmp_path)
    assert found["model"] == str(folder)
    assert "load_format" not in found


def test_limits_are_passed_on(tmp_path: Path) -> None:
    folder = nemotron_directory(tmp_path / "m")
    assert settings(folder, tmp_path)["max_model_len"] == 257
    found = settings(folder, tmp_path, context=100, kv_cache_dtype="fp8", gpu_memory_utilization=0.7)
    assert found["max_model_len"] == 101
    assert (found["kv_cache_dtype"], found["gpu_memory_utilization"]) == ("fp8", 0.7)
    with pytest.raises(ConfigError, match="context is 300; the model has 256 positions"):
        settings(folder, tmp_path, context=300)


YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "scaling",
    [
        {**YARN, "factor": 4.0},
        {**YARN, "factor": None},  # vLLM 0.32 fails on it
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
    ids=str,
)  # fmt: skip
def test_scaled_rope_has_the_context_and_the_scaling_of_the_built_in_engine(
    tmp_path: Path, scaling: dict[str, Any]
) -> None:
    folder = llama_directory(tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    values.pop("rope_parameters", None)
    theta = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    (folder / "config.json").write_text(json.dumps({**values, **theta, "rope_scaling": scaling}))
    with nemotron4.load(folder) as engine:
        built_in = engine.info.context_length
    found = settings(folder, tmp_path)
    assert built_in == 256  # max_position_embeddings, which a factor does not multiply
    assert found["max_model_len"] == built_in + 1
    rope = found["hf_overrides"].get("rope_parameters")
    if scaling["rope_type"] != "yarn":
        assert rope is None  # the file's own
        return
    original = scaling.get("original_max_position_embeddings", 256)
    expected = {"factor": 4.0, "original_max_position_embeddings": original, **theta}
    assert {name: rope[name] for name in expected} == expected
    assert rope["attention_factor"] == pytest.approx(1 + 0.1 * math.log(4))


def test_a_start_that_takes_too_long_is_explained() -> None:
    info = ModelInfo("m", 256, 512, 1, "bfloat16", "cuda", (3,), False)
    with pytest.raises(Nemotron4Error, match="vLLM did not start within 0 s") as caught:
        VllmEngine(
            lambda logger: time.sleep(0.3),
            info,
            FakeTokenizer(),
            None,
            max_running=1,
            max_waiting=1,
            start_timeout_s=0.05,
        )
    assert "--start-timeout-s" in str(caught.value.hint)


def full_disk(tensors: object, path: Path) -> None:
    path.write_bytes(b"half")
    raise SafetensorError("No space left on device")


def test_files_of_sent_tensors_go_when_later_ones_have_all_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(nemotron_directory(tmp_path / "model"))
    (tmp_path / "sent").mkdir()
    sent = SentWeights(checkpoint, None, tmp_path / "sent")
    first, second, *_ = checkpoint.tensors
    sent.keep({first: torch.zeros(1), second: torch.zeros(1)})
    sent.keep({first: torch.ones(1)})
    assert [Path(file).name for file in sent.files] == ["sent-0.safetensors", "sent-1.safetensors"]
    sent.keep({second: torch.ones(1)})
    assert [Path(file).name for file in sent.files] == ["sent-1.safetensors", "sent-2.safetensors"]
    assert sorted(map(str, (tmp_path / "sent").iterdir())) == sent.files
    with pytest.raises(CheckpointError, match="has no tensor 'other'"):
        sent.keep({"other": torch.zeros(1)})
    kept = sent.files
    monkeypatch.setattr(sent_weights, "save_file", full_disk)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        sent.keep({first: torch.zeros(1)})
    assert sorted(map(str, (tmp_path / "sent").iterdir())) == sent.files == kept
