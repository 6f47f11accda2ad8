"""Answers by servers that a trainer gives its weights: the whole way over HTTP, on tiny real models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.engine import SamplingParams, SamplingRequest
from nemotron4.errors import CheckpointError, ConfigError, TrainingError
from nemotron4.server.settings import ServerSettings
from nemotron4.training import run
from tests import tiny_models
from tests.server.conftest import Running, serving
from tests.training.test_policy_gradient import LengthJudge, judging, make, metrics

KEY = "tiny-key"


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.nemotron_directory(tmp_path_factory.mktemp("nemotron"))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON4_API_KEY", KEY)


@contextlib.contextmanager
def rollout_server(model: Path) -> Iterator[Running]:
    settings = ServerSettings(api_keys=(KEY,), takes_weights=True)
    with (
        nemotron4.load(model, dtype="float32", device="cpu", cache_gb=0.05) as engine,
        serving(engine, settings) as running,  # type: ignore[arg-type]
    ):
        yield running


def post(server: Running, body: dict, key: str = KEY) -> int:
    """The status of a call of /weights."""
    headers = {"Authorization": f"Bearer {key}"}
    return server.client.post("/weights", json=body, headers=headers).status_code


def with_servers(*servers: Running, **more: object) -> dict[str, object]:
    return {"servers": [server.url for server in servers], **more}


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "rank": 2, "targets": ["all"]}])
def test_two_servers_answer_by_the_weights_of_each_step(
    tmp_path: Path, nemotron: Path, adapter: dict | None
) -> None:
    more = {} if adapter is None else {"adapter": adapter}
    with rollout_server(nemotron) as first, rollout_server(nemotron) as second:
        recipe = make(
            tmp_path, nemotron, "grpo", run={"max_steps": 3, "save_every": 3},
            policy_gradient=with_servers(first, second, group_size=5, num_prompts=4), **more,
        )  # fmt: skip
        run.train(recipe, connect=judging(LengthJudge()))
    for line in metrics(tmp_path / "run"):
        assert line["sampler_gap"] < 1e-4  # the engine's own kernels round differently
        assert line["importance"] == pytest.approx(1, abs=1e-4)
        assert line["staleness"] == 0
    # The same run in one process draws its answers from the same seeds.
    alone = make(
        tmp_path, nemotron, "grpo", name="alone", run={"max_steps": 3, "save_every": 3},
        policy_gradient={"group_size": 5, "num_prompts": 4}, **more,
    )  # fmt: skip
    run.train(alone, connect=judging(LengthJudge()))
    # The kernels round differently, which may tip a draw: one token of twenty answers moves the mean by 0.3.
    rewards = [metrics(tmp_path / name)[0]["reward"] for name in ("run", "alone")]
    assert rewards[0] == pytest.approx(rewards[1], abs=0.7)


def test_answers_may_be_a_step_behind_and_are_weighed_for_it(tmp_path: Path, nemotron: Path) -> None:
    with rollout_server(nemotron) as server:
        recipe = make(
            tmp_path, nemotron, "grpo", run={"max_steps": 4, "save_every": 4},
            optimizer={"learning_rate": 3e-3}, policy_gradient=with_servers(server, max_staleness=1),
        )  # fmt: skip
        run.train(recipe, connect=judging(LengthJudge()))
    lines = metrics(tmp_path / "run")
    assert [line["staleness"] for line in lines] == [0, 1, 1, 1]
    assert lines[0]["sampler_gap"] < 1e-4
    assert all(line["sampler_gap"] > 1e-3 for line in lines[1:])
    assert all(line["importance"] != 1 for line in lines[1:])


def test_a_server_that_lost_the_weights_stops_the_run(tmp_path: Path, nemotron: Path) -> None:
    with rollout_server(nemotron) as server:

        def forget(progress: object) -> None:
            """As after a restart: the weights of the beginning, and their version."""
            if progress.step == 3:  # type: ignore[attr-defined]
                assert post(server, {"version": 0}) == 200

        recipe = make(
            tmp_path, nemotron, "grpo", run={"max_steps": 5, "save_every": 1},
            policy_gradient=with_servers(server),
        )  # fmt: skip
        with pytest.raises(TrainingError, match="updates old; expected at most 0"):
            run.train(recipe, connect=judging(LengthJudge()), on_progress=forget)
        assert run.train(recipe, connect=judging(LengthJudge())).steps == 5


def test_weights_take_effect_whole_and_forget_what_the_cache_knew(nemotron: Path) -> None:
    base = open_checkpoint(nemotron)
    net, _ = load_transformer(base, dtype=torch.float32)
    ids = tuple(base.tokenizer().encode("Shall I compare thee to a summer's day? " * 4))
    request = SamplingRequest(ids, SamplingParams(max_new_tokens=6, temperature=0.0, logprobs=0))
    changed = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i))
        for i, (name, tensor) in enumerate(dict(net.named_parameters()).items())
    }
    with nemotron4.load(nemotron, dtype="float32", device="cpu", cache_gb=0.05) as engine:
        [before] = engine.generate_each([request])
        engine.replace_weights({name: tensor.detach() for name, tensor in changed.items()})
        [after] = engine.generate_each([request])
        with pytest.raises(CheckpointError, match="no tensor of that name"):
            engine.replace_weights({"model.nothing": torch.zeros(2)})
        [again] = engine.generate_each([request])
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(changed[name])
        logits_V = net(torch.tensor([ids]))[0, -1].log_softmax(0)
    assert before.logprobs != after.logprobs
    assert again == after
    assert after.logprobs is not None
    assert after.logprobs[0] == pytest.approx(float(logits_V.max()), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"servers": ["http://127.0.0.1:9"], "temperature": 0.7}, "need temperature 1"),
        ({"max_staleness": 1}, "max_staleness needs servers"),
        ({"servers": ["http://127.0.0.1:9"], "max_staleness": 1, "max_resamples": 1}, "max_resamples = 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, Path("none"), "grpo", policy_gradient=change)


def test_a_server_takes_weights_only_with_a_key(nemotron: Path) -> None:
    with pytest.raises(ConfigError, match="must ask for a key"):
        ServerSettings(takes_weights=True)
    with rollout_server(nemotron) as server:
        assert post(server, {"version": 1}, "wrong") == 401
        assert post(server, {"version": 1}) == 200
        part = {"name": "lm_head.weight", "shape": [2], "dtype": "float32", "start": 4, "data": ""}
        assert post(server, {"parts": [part]}) == 409
