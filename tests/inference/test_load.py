"""``nemotron4.load`` on directories, with and without an adapter, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.engine import SamplingParams, SamplingRequest
from nemotron4.errors import CheckpointError, ConfigError, Nemotron4Error
from nemotron4.inference.engine import Engine
from nemotron4.inference.load import describe
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapter_files import adapter_tensors, write_adapter
from nemotron4.model.adapters import add_adapter
from tests.checkpoint.gguf_files import write_gguf
from tests.tiny_models import nemotron_directory

ROW = [7, 40, 41, 42, 43, 44, 45, 46]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    nemotron_directory(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_sampling_values_of_a_checkpoint_are_noted_as_not_used(tiny: Path) -> None:
    (tiny / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 1.0}')
    notes = describe(open_checkpoint(tiny), "float32", "cpu").notes
    assert "asks for temperature 0.6, which is not used" in notes[-1]


def test_a_directory_gives_the_scores_of_its_weights(tiny: Path) -> None:
    model, _ = load_transformer(open_checkpoint(tiny), dtype=torch.float32)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(torch.tensor([ROW]))[0], -1)
    expected = [float(logprobs[i, ROW[i + 1]]) for i in range(len(ROW) - 1)]
    with nemotron4.load(tiny, max_running=2) as engine:
        assert engine.score(token_ids=[ROW])[0] == pytest.approx(expected, abs=1e-4)


def test_a_lora_adapter_is_served_with_its_scale(tiny: Path, tmp_path: Path) -> None:
    model, _ = load_transformer(open_checkpoint(tiny), dtype=torch.float32)
    lora = AdapterConfig(kind="lora", rank=4, alpha=10.0, targets=("qkv", "up_proj"))
    add_adapter(model, lora, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
        logprobs = torch.log_softmax(model(torch.tensor([ROW]))[0], -1)
    write_adapter(tmp_path / "adapter", adapter_tensors(model, lora), lora, base=str(tiny))
    expected = [float(logprobs[i, ROW[i + 1]]) for i in range(len(ROW) - 1)]
    with nemotron4.load(tiny, max_running=2) as engine:
        plain = engine.score(token_ids=[ROW])[0]
    with nemotron4.load(tiny, adapter=tmp_path / "adapter", max_running=2) as engine:
        adapted = engine.score(token_ids=[ROW])[0]
    assert adapted == pytest.approx(expected, abs=1e-4)
    assert adapted != pytest.approx(plain, abs=1e-2)


def test_a_bottleneck_adapter_is_served_and_a_fresh_one_changes_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON4_NATIVE", "0")  # a bottleneck adapter is computed in PyTorch: so is its base
    model, _ = load_transformer(open_checkpoint(tiny), dtype=torch.float32)
    bottleneck = AdapterConfig(kind="bottleneck", rank=4)
    add_adapter(model, bottleneck, seed=1)
    write_adapter(tmp_path / "fresh", adapter_tensors(model, bottleneck), bottleneck, base=str(tiny))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapter_" in name:
                parameter.normal_(0.0, 0.3)
        expected = torch.log_softmax(model(torch.tensor([ROW]))[0, -1], -1)
    write_adapter(tmp_path / "trained", adapter_tensors(model, bottleneck), bottleneck, base=str(tiny))
    with nemotron4.load(tiny, max_running=2) as engine:
        plain = engine.score(token_ids=[ROW])
    with nemotron4.load(tiny, adapter=tmp_path / "fresh", max_running=2) as engine:
        assert engine.score(token_ids=[ROW]) == plain
    with nemotron4.load(tiny, adapter=tmp_path / "trained", max_running=2) as engine:
        assert next_logprobs(engine, ROW) == pytest.approx(expected.tolist(), abs=1e-4)


def test_virtual_tokens_precede_every_prompt_and_are_shared(tiny: Path, tmp_path: Path) -> None:
    model, _ = load_transformer(open_checkpoint(tiny), dtype=torch.float32)
    p_tuning = AdapterConfig(kind="p_tuning", num_virtual_tokens=40, encoder_hidden_size=16)
    add_adapter(model, p_tuning, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_" in name:
                parameter.normal_(0.0, 0.5)
        size = model.config.vocab_size
        logprobs = torch.log_softmax(model(torch.tensor([[*range(size, size + 40), *ROW]]))[0, 40:], -1)
    write_adapter(tmp_path / "adapter", adapter_tensors(model, p_tuning), p_tuning, base=str(tiny))
    expected = [float(logprobs[i, ROW[i + 1]]) for i in range(len(ROW) - 1)]
    with nemotron4.load(tiny, adapter=tmp_path / "adapter", max_running=2) as engine:
        assert engine.info.context_length == model.config.context_length - 40
        assert engine.score(token_ids=[ROW])[0] == pytest.approx(expected, abs=1e-4)
        first = next_logprobs(engine, ROW)
        assert first == pytest.approx(logprobs[-1].tolist(), abs=1e-4)
        assert next_logprobs(engine, ROW, repetition_penalty=1.5) == first  # the virtual ids are no tokens
        # Of both requests after the scored row: its first block is virtual.
        assert engine.stats().prompt_tokens_reused_total == 64
        assert engine.stats().prompt_tokens_total == 3 * len(ROW)


def next_logprobs(engine: Engine, row: list[int], **sampling: float) -> list[float]:
    """The log-probabilities of every token after the row."""
    params = SamplingParams(max_new_tokens=1, temperature=0, full_logprobs=True, **sampling)
    [[step]] = engine.collect([SamplingRequest(tuple(row), params)])
    return list(step.logprobs.full)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"dtype": "float33"}, ConfigError, "unknown dtype 'float33'"),
        ({"device": "gpu"}, ConfigError, "unknown device 'gpu'"),
        ({"quantize": "int3"}, ConfigError, "unknown quantize 'int3'"),
        ({"quantize": "int8", "dtype": "float32"}, ConfigError, "a weight has one type"),
        ({"cache_gb": 0.0}, ConfigError, "hold no request"),
        ({"kv_cache_dtype": "fp8"}, ConfigError, "'fp8'; the built-in engine has auto and int8"),
        (
            {"kv_cache_dtype": "int8", "dtype": "float32"},
            ConfigError,
            "weights in float32 on cpu do not have",
        ),
        (
            {"kv_cache_dtype": "int8", "dtype": "float16"},
            ConfigError,
            "weights in float16 on cpu do not have",
        ),
        ({"adapter": "nowhere"}, CheckpointError, "nowhere/adapter_config.json"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    tiny: Path, settings: dict[str, object], kind: type[Nemotron4Error], words: str
) -> None:
    with pytest.raises(kind, match=words):
        nemotron4.load(tiny, **settings)  # type: ignore[arg-type]


def test_a_cache_of_eight_bits_holds_nearly_twice_as_much(tiny: Path) -> None:
    found = {}
    for name in ("auto", "int8"):
        with nemotron4.load(tiny, dtype="bfloat16", kv_cache_dtype=name, cache_gb=0.01) as engine:
            config = open_checkpoint(tiny).config
            found[name] = engine.stats().cache_blocks_total
            assert engine.generate("a b", max_new_tokens=3, temperature=0)[0].token_ids
    dim = config.head_dim
    assert found["int8"] / found["auto"] == pytest.approx(2 * dim / (dim + 4), rel=0.01)


def test_a_server_is_built_without_torch() -> None:
    """Nor with what only asks other servers."""
    program = "import sys, nemotron4.server.run, nemotron4.server.guard, nemotron4.cli.serve;"
    program += "print({'torch', 'aiohttp'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.split() == ["set()"], ended.stderr


@pytest.mark.parametrize("kind", ["directory", "gguf"])
def test_a_model_is_loaded_and_generates_without_torch(tiny: Path, tmp_path: Path, kind: str) -> None:
    """Importing torch takes longer than everything else from the start to the first token."""
    model = tiny
    if kind == "gguf":
        source = nemotron_directory(tmp_path / "wider", hidden_size=64, intermediate_size=96, head_dim=32)
        model = write_gguf(source, tmp_path / "tiny.gguf", Kind.Q8_0)
    program = (
        "import sys, nemotron4; engine = nemotron4.load(sys.argv[1]);"
        "engine.generate('hello', max_new_tokens=4, seed=1, top_p=0.9, logprobs=2); engine.close();"
        "print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(model)], capture_output=True, text=True)
    assert ended.stdout.split() == ["False"], ended.stderr
