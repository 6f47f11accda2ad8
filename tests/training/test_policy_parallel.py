"""Policy gradients on two gloo processes against one: rollouts, rewards, losses, weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_models
from tests.training import policy_run
from tests.training.launching import ENVIRONMENT, ROOT, command, run_train

TIMES = {"seconds", "rollout_seconds", "tokens_per_s", "memory_gb"}
PROMPTS = [{"role": "user", "content": f"Add {i} and {i}"} for i in range(6)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": [message]}) + "\n" for message in PROMPTS)
    )
    return tiny_models.nemotron_directory(folder / "model")


def values(folder: Path, start: Path, algorithm: str, /, **more: Any) -> dict[str, Any]:
    prompts = str(start.parent / "prompts.jsonl")
    return {
        "stage": "policy-gradient",
        "model": {"start": str(start), "device": "cpu"},
        "data": {"train": [prompts], "validation": [prompts], "max_length": 80},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0, "eps": 1e-5},
        "batch": {"global_size": 6, "row_tokens": 200},
        "run": {"directory": str(folder), "max_steps": 3, "save_every": 2},
        "policy_gradient": {
            "algorithm": algorithm, "rewards": [{"kind": "pattern", "pattern": ".*"}], "num_prompts": 3,
            "group_size": 4, "max_new_tokens": 6, "unfinished": "judge", "entropy_bonus": 0.01,
            "critic": {"learning_rate": 1e-4},
        },
        "samples": {"prompts": prompts, "max_new_tokens": 6},
        **more,
    }  # fmt: skip


def start_launch(folder: Path, runs: list[dict[str, Any]]) -> subprocess.Popen[str]:
    (folder / "runs.json").write_text(json.dumps(runs))
    return subprocess.Popen(
        command("tests.training.policy_run", str(folder / "runs.json"), processes=2),
        cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def launch(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Train all of them in one start of two processes."""
    process = start_launch(folder, runs)
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output[-6000:]


def outcome(folder: Path) -> tuple[list[dict[str, Any]], list[Any], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    (weights,) = [*folder.glob("model/*.safetensors"), *folder.glob("adapter/*.safetensors")]
    return lines, answers, load_file(weights)


def assert_same_run(one: Path, many: Path) -> None:
    (lines_one, answers_one, weights_one), (lines_many, answers_many, weights_many) = map(
        outcome, (one, many)
    )
    assert answers_one == answers_many
    assert len(answers_one) == 2 * len(PROMPTS)
    assert len(lines_one) == len(lines_many) == 5
    for a, b in zip(lines_one, lines_many, strict=True):
        for name in (a.keys() | b.keys()) - {"kind", *TIMES}:
            # The gap is itself a rounding, the largest one.
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5 if name == "sampler_gap" else 1e-6), (
                name
            )
    assert weights_one.keys() == weights_many.keys()
    for name, tensor in weights_one.items():
        torch.testing.assert_close(weights_many[name], tensor, rtol=0, atol=1e-6)


def test_two_processes_share_the_answers_and_learn_the_same(tmp_path: Path, start: Path) -> None:
    layout = {"parallel": {"data": 2}}
    launch(tmp_path, [values(tmp_path / "many", start, "ppo", **layout)])
    policy_run.train(values(tmp_path / "one", start, "ppo"))
    assert_same_run(tmp_path / "one", tmp_path / "many")


CASES = {
    "grpo, data": ("grpo", {"parallel": {"data": 2}}),
    "grpo, tensor": ("grpo", {"parallel": {"tensor": 2}}),
    "grpo, pipeline": ("grpo", {"parallel": {"pipeline": 2}}),
    "ppo, tensor": ("ppo", {"parallel": {"tensor": 2}}),
    "ppo, pipeline": ("ppo", {"parallel": {"pipeline": 2}}),
    "reinforce, replicas": ("reinforce", {"parallel": {"data": 2, "replicas": 2}}),
    "grpo with lora, pipeline": (
        "grpo",
        {"parallel": {"pipeline": 2}, "adapter": {"kind": "lora", "rank": 4, "targets": ["all"]}},
    ),
    "grpo with lora, tensor": (
        "grpo",
        {"parallel": {"tensor": 2}, "adapter": {"kind": "lora", "rank": 4, "targets": ["all"]}},
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_layout_learns_the_same(tmp_path: Path, start: Path) -> None:
    launch(tmp_path, [values(tmp_path / name, start, kind, **more) for name, (kind, more) in CASES.items()])
    for name, (kind, more) in CASES.items():
        policy_run.train(values(tmp_path / f"one {name}", start, kind, **more | {"parallel": {}}))
        try:
            assert_same_run(tmp_path / f"one {name}", tmp_path / name)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_of_two_processes_changes_no_number(tmp_path: Path, start: Path) -> None:
    longer = {"max_steps": 10, "save_every": 2}
    layout = {"parallel": {"data": 2}}
    whole, broken = (
        values(tmp_path / name, start, "ppo", run=longer | {"directory": str(tmp_path / name)}, **layout)
        for name in ("whole", "broken")
    )
    launch(tmp_path, [whole])
    process = start_launch(tmp_path, [broken])
    path = tmp_path / "broken" / "metrics.jsonl"
    while not path.exists() or path.read_text().count('"train"') < 5:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    # torchrun gives each of its processes a session; they end with the connection to it at the latest.
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()
    launch(tmp_path, [broken])
    (lines_whole, answers_whole, weights_whole), (lines, answers, weights) = map(
        outcome, (tmp_path / "whole", tmp_path / "broken")
    )
    assert len(lines) == 12
    assert [untimed(line) for line in lines] == [untimed(line) for line in lines_whole]
    assert answers == answers_whole
    assert all(torch.equal(weights[name], tensor) for name, tensor in weights_whole.items())


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in TIMES}


CHAIN = """
model = {{ start = "{start}", device = "cpu" }}
data = {{ max_length = 200 }}
optimizer = {{ learning_rate = 1e-4, warmup_steps = 0, eps = 1e-5 }}
batch = {{ global_size = 4, row_tokens = 200 }}
run = {{ directory = "{folder}", max_steps = 2 }}

[[stage]]
name = "sft"
kind = "sft"
data = {{ train = [{{ path = "{rows}", ignore = ["attributes"] }}] }}

[[stage]]
name = "reward"
kind = "reward"
data = {{ train = ["{rows}"] }}

[[stage]]
name = "ppo"
kind = "policy-gradient"
data = {{ train = ["{prompts}"] }}

[stage.policy_gradient]
algorithm = "ppo"
rewards = [{{ kind = "reward_model", model = "previous" }}]
num_prompts = 3
group_size = 2
max_new_tokens = 6
unfinished = "judge"
critic = {{ start = "previous", learning_rate = 1e-4 }}
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_chain_to_ppo_is_the_same_on_two_processes(tmp_path: Path, start: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    answers = [
        {"messages": [message, {"role": "assistant", "content": str(i)}], "attributes": {"helpfulness": i}}
        for i, message in enumerate(PROMPTS)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in answers))
    weights = []
    for place, layout in enumerate(([], ["parallel.data=2"])):
        folder, recipe = tmp_path / f"run{place}", tmp_path / f"chain{place}.toml"
        prompts = start.parent / "prompts.jsonl"
        recipe.write_text(CHAIN.format(start=start, rows=rows, prompts=prompts, folder=folder))
        for _ in range(2):  # the second time every stage but the last is passed over
            written = run_train(recipe, *layout, processes=1 + len(layout))
        assert written.count("finished before") == 2
        weights.append(load_file(folder / "02-ppo" / "model" / "model.safetensors"))
    one, many = weights
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=0, atol=1e-6)
