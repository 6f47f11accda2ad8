"""Two and four gloo processes against one: losses, gradient norms and final weights."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny_models
from tests.training import parallel_run
from tests.training.launching import ENVIRONMENT, ROOT, command, run_train
from tests.training.parallel_run import Case, write_cases


def launch(folder: Path, cases: list[Case], *, timeout_s: float = 110) -> None:
    """Run the cases, which need equally many processes, in one start of them."""
    (size,) = {case.layout.num_processes for case in cases}
    folder.mkdir(exist_ok=True)
    write_cases(folder / "cases.json", cases)
    process = subprocess.run(
        command("tests.training.parallel_run", str(folder / "cases.json"), processes=size),
        cwd=ROOT, env=ENVIRONMENT, timeout=timeout_s, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stdout[-600:] + process.stderr[-6000:]


def outcome(case: Case) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Every recorded line, and the final weights."""
    folder = Path(case.folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any(line["kind"] == "validation" for line in lines)
    return lines, json.loads((folder / "weights.json").read_text())


def ends(case: Case) -> list[Any]:
    """For each process the steps that it did, or its error."""
    found: list[Any] = json.loads((Path(case.folder) / f"end{case.fault}.json").read_text())
    assert len(found) == case.layout.num_processes
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one process makes of a case."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def run(stage: str, adapter: str, tied: bool) -> Any:
        case = Case(str(folder / f"{stage}-{adapter}-{tied}"), stage, adapter, tied)
        parallel_run.run(case)
        return outcome(case)

    return lambda case: run(case.stage, case.adapter, case.tied)


def assert_same_run(one: Any, many: Any) -> None:
    (lines_one, weights_one), (lines_many, weights_many) = one, many
    assert len(lines_one) == len(lines_many) > 0
    for a, b in zip(lines_one, lines_many, strict=True):
        assert a.keys() == b.keys()
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6, abs=1e-6)
        if a["kind"] == "train":
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-6)
            assert b["tokens"] == a["tokens"]
    assert weights_one.keys() == weights_many.keys()
    for name, values in weights_one.items():
        assert weights_many[name] == pytest.approx(values, rel=0, abs=1e-6), name


LAYOUTS: list[dict[str, int]] = [
    {"data": 2},
    {"data": 2, "replicas": 2},
    {"tensor": 2},
    {"pipeline": 2},
    {"data": 2, "tensor": 2},
    {"data": 4, "replicas": 2},
    {"pipeline": 2, "tensor": 2},
    {"pipeline": 2, "data": 2},
    {"pipeline": 4},
]
MODELS = [
    *({"stage": stage, "adapter": adapter} for stage in ("sft", "reward", "dpo", "rpo")
      for adapter in ("none", "lora")),
    {"stage": "sft", "tied": True},
    {"stage": "kto"},
    {"stage": "dpo", "recompute": True},
]  # fmt: skip


def assert_all_same(cases: list[Case], alone: Any) -> None:
    for case in cases:
        try:
            assert_same_run(alone(case), outcome(case))
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


def test_two_pipeline_stages_train_stop_and_go_on_as_one_process(tmp_path: Path, alone: Any) -> None:
    case = Case(str(tmp_path / "run"), "rpo", tied=True, pipeline=2)
    stopped = replace(case, fault="sigterm")
    bad = replace(case, folder=str(tmp_path / "bad"), fault="nan")
    launch(tmp_path / "launch", [stopped, case, bad])
    assert_all_same([case], alone)
    assert ends(stopped) == [2, 2]
    assert ends(case) == [6, 6]
    for error in ends(bad):
        assert "the loss is nan" in error
        assert "pairs.jsonl:8" in error


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_trains_as_one_process(tmp_path: Path, layout: dict[str, int], alone: Any) -> None:
    cases = [
        Case(str(tmp_path / str(number)), **model, **layout)  # type: ignore[arg-type]
        for number, model in enumerate(MODELS)
    ]
    launch(tmp_path / "launch", cases, timeout_s=500)
    assert_all_same(cases, alone)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_checkpoint_resumes_under_another_layout(tmp_path: Path, alone: Any, adapter: str) -> None:
    many = Case(str(tmp_path / "run"), "rpo", adapter)
    launch(tmp_path / "a", [replace(many, data=2, steps=1)], timeout_s=250)
    launch(tmp_path / "b", [replace(many, tensor=2, steps=3)], timeout_s=250)
    launch(tmp_path / "c", [replace(many, pipeline=2, tensor=2, steps=4)], timeout_s=250)
    parallel_run.run(many)
    assert_same_run(alone(many), outcome(many))


RECIPE = """
stage = "{stage}"
model = {{ start = "{start}", device = "cpu" }}
data = {{ train = ["{train}"], max_length = 200 }}
optimizer = {{ learning_rate = 1e-3, warmup_steps = 0, eps = 1e-3 }}
batch = {{ global_size = 4, row_tokens = 400 }}
run = {{ directory = "{folder}", max_steps = 2 }}
{more}
"""
COMMANDS = {
    "dpo": ("preference", 'preference = { loss = "dpo", beta = 0.1 }', "parallel.pipeline=2", "model"),
    "rpo with lora": (
        "preference",
        'preference = { loss = "rpo", beta = 0.1 }\nadapter = { kind = "lora", rank = 4 }',
        "parallel.pipeline=2",
        "adapter",
    ),
    "reward": ("reward", 'reward = { objective = "bradley_terry" }', "parallel.data=2", "model"),
    "sft": ("sft", "", "parallel.tensor=2", "model"),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_leaves_the_output_of_one_process(tmp_path: Path, name: str) -> None:
    stage, more, layout, output = COMMANDS[name]
    start = tiny_models.nemotron_directory(tmp_path / "start")
    answers = [{"role": "assistant", "content": text} for text in ("It is so.", "I do not know.")]
    rows = []
    for i in range(6):
        question = [{"role": "user", "content": f"What is {i} plus {i}?"}]
        pair = {"prompt": question, "chosen": [answers[0]], "rejected": [answers[1]]}
        rewards = {"chosen_reward": 3.0, "rejected_reward": 1.0}
        rows.append({"messages": [*question, answers[0]]} if stage == "sft" else pair | rewards)
    train = tmp_path / "rows.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for processes, settings in ((1, []), (2, [layout])):
        folder = tmp_path / f"run{len(found)}"
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(RECIPE.format(stage=stage, start=start, train=train, folder=folder, more=more))
        run_train(recipe, *settings, processes=processes)
        file = "model.safetensors" if output == "model" else "adapter_model.safetensors"
        record = json.loads((folder / "run.json").read_text())
        found.append((load_file(folder / output / file), record["fingerprint"], record["start_weights"]))
    (one, *identity_one), (many, *identity_many) = found
    assert identity_one == identity_many
    assert one.keys() == many.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, rtol=0, atol=2e-6)
