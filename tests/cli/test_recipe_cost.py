"""A recipe before it runs: stages on groups that do not exist, their hours, failures and batch scripts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nemotron4.cli.main import main
from nemotron4.cluster.layout import training_operations
from nemotron4.model.presets import nano

ROOT = Path(__file__).parents[2]
TRAIN = """
stage = "pretrain"
[model]
preset = "nano"
tokenizer = "somewhere"
[data]
train = ["data/not-here.jsonl"]
max_length = 256
[optimizer]
learning_rate = 1e-3
[batch]
global_size = 64
row_tokens = 256
[run]
directory = "runs/x"
max_steps = 100
[parallel]
data = 4
tensor = 2
"""
RECIPE = """
name = "small"

[[stage]]
name = "train"
commands = [["nemotron4", "train", "{recipe}/train.toml", "run.directory={folder}"]]
makes = ["{folder}/model"]
volume = { samples = 6400, tokens = 128, efficiency = 0.5, gpu = "h100-80gb" }

[[stage]]
name = "data"
serve = ["nemotron4", "serve", "{train}/model", "--port", "{port}"]
commands = [["nemotron4", "synth", "run", "{recipe}/synth.toml", "--out", "{folder}/run"]]
makes = ["{folder}/run"]
volume = { samples = 360, tokens = 10, efficiency = 0.5, gpu = "h100-80gb", model = "nano" }

[[stage]]
name = "eval"
commands = [["nemotron4", "eval", "run", "gsm8k", "--model", "x", "--out", "{folder}/run"]]
makes = ["{folder}/run"]
volume = { samples = 1319, tokens = 100, efficiency = 0.5, gpu = "h100-80gb", model = "nano" }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "train.toml").write_text(TRAIN)
    (tmp_path / "synth.toml").write_text((ROOT / "recipes" / "fake" / "synth.toml").read_text("utf-8"))
    return tmp_path


def test_every_stage_is_rehearsed_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "run", str(folder), "--dry-run", "--json"]) == 0
    train, data, evaluation = (s["cost"] for s in json.loads(capsys.readouterr().out)["stages"])
    assert (train["steps"], train["gpus"]) == (100, 8)
    operations = training_operations(nano(), batch=1, context=256) * 6400 * 128 / 256
    assert train["hours"] == pytest.approx(operations / (8 * 989e12 * 0.5 * 3600), abs=0.01)
    # Weights and two moments in float32, each number on one of the eight but for the norms.
    assert train["state_bytes_per_rank"] == pytest.approx(12 * nano().num_parameters / 8, rel=0.05)
    assert "360 rows" in data["data"]
    assert data["steps"] is None
    assert evaluation["data"] == "1,319 answers"
    (folder / "train.toml").write_text(TRAIN.replace("[run]", '[run]\nresult_dtype = "float32"'))
    assert main(["recipe", "run", str(folder), "--dry-run", "--json"]) == 0
    wide = json.loads(capsys.readouterr().out)["stages"][0]["cost"]
    assert wide["disk_bytes"] - train["disk_bytes"] == 2 * nano().num_parameters


def test_steps_that_do_not_take_the_samples_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "train.toml"
    path.write_text(TRAIN.replace("max_steps = 100", "max_steps = 90"))
    assert main(["recipe", "run", str(folder), "--dry-run"]) == 1
    assert "its steps take 5,760 samples, and the stage's volume says 6,400" in capsys.readouterr().err
    path.write_text(TRAIN.replace("tensor = 2", "tensor = 7"))
    assert main(["recipe", "run", str(folder), "--dry-run"]) == 1
    assert "stage train: " in capsys.readouterr().err


def test_each_stage_has_a_batch_script_and_they_follow_each_other(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = folder / "jobs"
    assert main(["recipe", "run", str(folder), "--dry-run", "--slurm", str(jobs)]) == 0
    shown = capsys.readouterr().out
    assert "goodput" in shown
    assert "T = B*s tokens in windows of s" in shown
    train = (jobs / "01-train.sbatch").read_text()
    assert "--nodes=1" in train
    assert "--gpus-per-node=8" in train
    assert "--time=2:00:00" in train
    assert "-m nemotron4 train" in train
    data = (jobs / "02-data.sbatch").read_text()
    assert (
        data.index(" serve ") < data.index("until curl") < data.index("synth run") < data.index("kill -TERM")
    )
    for script in jobs.iterdir():
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert '--dependency=afterok:"$job" 02-data.sbatch' in (jobs / "submit.sh").read_text()
    assert main(["recipe", "run", str(folder), "--out", str(folder / "o"), "--slurm", str(jobs)]) == 1


@pytest.mark.slow
def test_the_340b_is_walked_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["recipe", "run", "recipes/nemotron4-340b", "--dry-run", "--json"]) == 0
    stages = {s["stage"]: s["cost"] for s in json.loads(capsys.readouterr().out)["stages"]}
    assert stages["pretrain"]["steps"] == 900_692
    assert stages["pretrain"]["gpus"] == 6144
    # As the report's 8.0 s for a step of 2,304 windows on 6,144 GPUs.
    seconds = 1_953_123_072 / 2304 * 8.0
    assert stages["pretrain"]["hours"] * 3600 == pytest.approx(seconds, rel=0.02)
    assert [stages[name]["steps"] for name in ("code-sft", "general-sft", "dpo")] == [6250, 4688, 625]
    assert stages["rpo-3"]["gpus"] == 128
