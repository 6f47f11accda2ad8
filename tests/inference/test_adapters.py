"""Several adapters beside one base: each row as if its own adapter were merged, whoever runs next to it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.engine import SamplingRequest
from nemotron4.errors import CheckpointError, ConfigError, RequestError
from nemotron4.inference.engine import Engine
from nemotron4.inference.runner import NativeRunner
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapter_files import adapter_tensors, write_adapter
from nemotron4.model.adapters import add_adapter
from tests import tiny_models

BASES = {"llama": tiny_models.llama_directory, "nemotron": tiny_models.nemotron_directory}
PROMPTS = [list(range(40 + 9 * i, 40 + 9 * i + length)) for i, length in enumerate((3, 70, 33, 64))]


def write_lora(base: Path, folder: Path, *, seed: int, **config: Any) -> Path:
    """A LoRA whose update is as large as the weights."""
    model, _ = load_transformer(open_checkpoint(base), dtype=torch.float32, device=torch.device("cpu"))
    settings = AdapterConfig(kind="lora", **{"rank": 4, "targets": ("all",), **config})
    if base.name == "nemotron" and settings.targets == ("all",):
        settings = dataclasses.replace(settings, targets=("attention", "up_proj", "down_proj"))
    add_adapter(model, settings, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    write_adapter(folder, adapter_tensors(model, settings), settings, base=str(base))
    return folder


@pytest.fixture(params=list(BASES))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return BASES[request.param](tmp_path / request.param)


@pytest.fixture
def adapters(base: Path, tmp_path: Path) -> dict[str, Path]:
    narrow: dict[str, Any] = {"targets": ("q_proj", "v_proj", "down_proj"), "rank": 3, "alpha": 7.0}
    if base.name == "llama":
        narrow |= {"rank_pattern": {"layers.0.*q_proj": 2, "v_proj": 5}, "alpha_pattern": {"down_proj": 1.0}}
    return {
        "wide": write_lora(base, tmp_path / "wide", seed=1),
        "narrow": write_lora(base, tmp_path / "narrow", seed=2, **narrow),
    }


def answers(engine: Engine, names: list[str | None]) -> list[Any]:
    """Each prompt with each adapter, all in one batch."""
    params = [engine_params(name) for name in names]
    requests = [engine.request(prompt, each) for prompt in PROMPTS for each in params]
    return engine.generate_each(requests)


def engine_params(name: str | None) -> nemotron4.engine.SamplingParams:
    settings = {"max_new_tokens": 8, "temperature": 0.0, "ignore_eos": True, "logprobs": 0}
    return nemotron4.engine.SamplingParams(**settings, adapter=name)  # type: ignore[arg-type]


@pytest.fixture(params=["native", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes: PyTorch is the library's twin."""
    if request.param == "torch":
        monkeypatch.setenv("NEMOTRON4_NATIVE", "0")
    return str(request.param)


def test_each_row_has_its_own_adapter_as_if_it_were_merged(
    base: Path, adapters: dict[str, Path], path: str
) -> None:
    names: list[str | None] = [None, "wide", "narrow"]
    with nemotron4.load(base, dtype="float32", adapters=adapters, max_running=5) as engine:
        assert isinstance(engine._runner, NativeRunner) is (path == "native")
        found = answers(engine, names)
        again = answers(engine, names)  # from the prefix cache, which keeps adapters apart
    assert [each.token_ids for each in again] == [each.token_ids for each in found]
    for place, name in enumerate(names):
        folder = None if name is None else adapters[name]
        with nemotron4.load(base, dtype="float32", adapter=folder) as merged:
            expected = merged.generate(PROMPTS, max_new_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
        own = found[place :: len(names)]
        assert [each.token_ids for each in own] == [each.token_ids for each in expected]
        for one, other in zip(own, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert len({each.token_ids for each in found}) > len(PROMPTS)


def test_guessed_tokens_have_the_adapter_of_their_request(
    base: Path, adapters: dict[str, Path], path: str
) -> None:
    found = []
    for most in (0, 7):
        with nemotron4.load(base, dtype="float32", adapters=adapters, num_speculative_tokens=most) as engine:
            engine._scheduler.max_guessing = 3
            params = [
                dataclasses.replace(engine_params(name), max_new_tokens=60)
                for name in (None, "wide", "narrow")
            ]
            found.append(engine.generate_each([engine.request(PROMPTS[1], each) for each in params]))
            stats = engine.stats()
    assert found[0] == found[1]
    num_right = stats.spec_decode_num_accepted_tokens_total
    assert 0 < num_right < stats.spec_decode_num_draft_tokens_total


@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_short_weights_take_adapters_and_give_each_row_the_same_bits_in_any_batch(
    base: Path, adapters: dict[str, Path], precision: str
) -> None:
    settings: dict[str, Any] = {"dtype": precision} if precision == "bfloat16" else {"quantize": precision}
    names: list[str | None] = ["wide", None, "narrow"]
    with nemotron4.load(base, dtype="float32", adapters=adapters) as engine:
        exact = scores(engine, names)
    with nemotron4.load(base, adapters=adapters, **settings) as engine:
        found = scores(engine, names)
        together = answers(engine, names)
        for i, each in enumerate(together):
            prompt = PROMPTS[i // len(names)]
            [alone] = engine.generate_each([engine.request(prompt, engine_params(names[i % len(names)]))])
            assert (alone.token_ids, alone.logprobs) == (each.token_ids, each.logprobs)
    with nemotron4.load(base, **settings) as engine:  # a base that has no room for adapters
        bare = answers(engine, [None])
    assert [each.logprobs for each in together[1 :: len(names)]] == [each.logprobs for each in bare]
    off = [torch.tensor(a) - torch.tensor(b) for a, b in zip(found, exact, strict=True)]
    distance = torch.tensor(exact[0]) - torch.tensor(exact[1])  # that the adapter makes
    assert max(float(each.abs().mean()) for each in off) < 0.3 * float(distance.abs().mean())


def scores(engine: Engine, names: list[str | None]) -> list[Any]:
    """Log-probabilities of every token at the end of one prompt, with each adapter."""
    params = [
        dataclasses.replace(engine_params(name), max_new_tokens=1, full_logprobs=True) for name in names
    ]
    steps = engine.collect([SamplingRequest(tuple(PROMPTS[1]), each) for each in params])
    return [each[0].logprobs.full for each in steps]


def test_adapters_come_and_go_while_requests_run(base: Path, adapters: dict[str, Path]) -> None:
    with nemotron4.load(base, adapters={}) as engine:
        assert engine.adapter_names == ()
        with pytest.raises(RequestError, match="no adapter 'wide' is loaded"):
            answers(engine, ["wide"])
        engine.load_adapter("wide", str(adapters["wide"]))
        first = answers(engine, ["wide"])
        with pytest.raises(ConfigError, match="loaded already"):
            engine.load_adapter("wide", str(adapters["narrow"]))
        engine.unload_adapter("wide")
        engine.load_adapter("wide", str(adapters["narrow"]))  # another one under the same name
        assert answers(engine, ["wide"]) != first
        with pytest.raises(ConfigError, match="no adapter 'other' is loaded"):
            engine.unload_adapter("other")


def test_what_cannot_stand_beside_the_base_is_refused(tmp_path: Path) -> None:
    base = tiny_models.llama_directory(tmp_path / "llama")
    dora = write_lora(base, tmp_path / "dora", seed=1, use_dora=True)
    wide = write_lora(base, tmp_path / "wide", seed=2)
    other = tiny_models.llama_directory(tmp_path / "other", seed=5, hidden_size=96)
    foreign = write_lora(other, tmp_path / "foreign", seed=1)
    with nemotron4.load(base, adapters={}) as engine:
        with pytest.raises(CheckpointError, match="more than LoRA"):
            engine.load_adapter("dora", str(dora))
        with pytest.raises(CheckpointError, match=r"other|factors"):
            engine.load_adapter("foreign", str(foreign))
    for more in ({"r": 2}, {"rank_pattern": {"q_proj": 3}}):
        config = {**json.loads((wide / "adapter_config.json").read_text()), **more}
        (dora / "adapter_config.json").write_text(json.dumps(config))
        (dora / "adapter_model.safetensors").write_bytes((wide / "adapter_model.safetensors").read_bytes())
        with pytest.raises(CheckpointError, match=r"_proj has rank 4; adapter_config\.json says [23]"):
            nemotron4.load(base, adapter=dora)
    with nemotron4.load(base) as engine, pytest.raises(RequestError, match="without adapters"):
        engine.load_adapter("x", str(dora))
    with pytest.raises(ConfigError, match="name them all"):
        nemotron4.load(base, adapter=dora, adapters={})
