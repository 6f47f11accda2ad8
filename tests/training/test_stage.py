"""A new stage of training is one new file: its table, rows, sample, loss, numbers and what doctor says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron4.cli.main import main
from nemotron4.errors import ConfigError
from nemotron4.training import recipe as recipes
from nemotron4.training import run, stage, stages
from tests import tiny_models

TOY = """
from dataclasses import dataclass

from nemotron4.training.encoding import RowError, RowKind
from nemotron4.training.losses import SumCount
from nemotron4.training.samples import Sample
from nemotron4.training.scorer import segment_logprobs
from nemotron4.training.stage import Objective, Stage, Terms


@dataclass(frozen=True, kw_only=True)
class ToySection:
    strength: float = 1.0


class RiddleKind(RowKind):
    name = "riddles"

    def parse(self, row):
        return row.text("riddle"), row.text("solution")

    def sample(self, row, encoder):
        if row[0] == row[1]:
            raise RowError("the riddle is its own solution")
        return Sample((encoder.answer(*row),))

    def findings(self, row, sample, encoder):
        if not row[0].endswith("?"):
            yield "no_question", "the riddle asks nothing"


@dataclass(frozen=True)
class ToyObjective(Objective):
    strength: float

    def count(self, row):
        return float(len(row.samples))

    def terms(self, scores, row):
        sums_S = segment_logprobs(scores, row)
        num = float(len(row.samples))
        loss = SumCount(-self.strength * sums_S.sum(), sums_S.new_tensor(num))
        return Terms(loss, {"solution_logprob": (float(sums_S.detach().sum()), num)})


class Toy(Stage):
    name = "toy-riddles"
    section = ToySection
    kinds = (RiddleKind(),)
    examples = {"riddles": {"strength": 0.5}}

    def objective(self, settings):
        return ToyObjective(settings.strength)


STAGE = Toy()
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "more_stages"
    folder.mkdir()
    (folder / "toy_riddles.py").write_text(TOY)
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(folder)])
    rows = [{"riddle": f"{i} legs in the morning?", "solution": f" man {i}"} for i in range(4)]
    rows[3]["riddle"] = "No legs"
    (tmp_path / "riddles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_models.nemotron_directory(tmp_path / "model")
    return tmp_path


def test_doctor_helps_with_every_kind_of_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "data", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(f" {name}," in said or f" {name}." in said for name in stage.kinds())


WRONG = """
stage = "sft"
model = { start = "smolm2", compute = "fp16" }
data = { train = ["nothere.jsonl"], max_lenght = 3 }
optimizer = { lr = 1e-4 }
batch = { global_size = 0, row_tokens = 0 }
run = { directory = "runs/x", max_steps = 1 }
preference = { beta = 1 }
"""


def test_all_that_is_wrong_with_a_recipe_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text(WRONG)
    program = (
        "import sys; from nemotron4.cli.main import main\n"
        "print(main(['train', 'wrong.toml']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "1 False\n"
    for problem in (
        "wrong.toml:8: table [preference] has no meaning in stage sft",
        "model.compute is 'fp16'",
        "unknown key 'data.max_lenght'",
        "hint: here it is optimizer.learning_rate",
        "'optimizer.learning_rate' is missing",
        "batch.global_size is 0",
        "batch.row_tokens is 0",
        "no model 'smolm2'",
        "nothere.jsonl: cannot be read",
    ):
        assert problem in done.stderr


def test_our_stages_are_named_and_described_without_torch() -> None:
    program = (
        "import sys; from nemotron4.training import stage; stage.kinds(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_one_file_adds_a_stage(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "toy-riddles" in stage.names()
    values = {
        "stage": "toy-riddles",
        "toy_riddles": {"strength": 0.5},
        "model": {"start": str(toy / "model"), "device": "cpu"},
        "data": {"train": [str(toy / "riddles.jsonl")], "max_length": 64},
        "optimizer": {"learning_rate": 1e-3},
        "batch": {"row_tokens": 256, "global_size": 4},
        "run": {"directory": str(toy / "run"), "max_steps": 3},
    }
    run.train(recipes.build(values))
    lines = [json.loads(line) for line in (toy / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["solution_logprob"] == pytest.approx(-2 * lines[-1]["loss"])
    record = json.loads((toy / "run" / "run.json").read_text())
    assert record["recipe"]["toy_riddles"] == {"strength": 0.5}
    with pytest.raises(ConfigError, match=r"unknown key 'toy_riddles.strenght'"):
        recipes.build(values | {"toy_riddles": {"strenght": 1}})
    command = ["doctor", "data", str(toy / "riddles.jsonl"), "--kind", "riddles"]
    capsys.readouterr()
    assert main([*command, "--model", str(toy / "model")]) == 0
    assert "riddles.jsonl:4: the riddle asks nothing" in capsys.readouterr().out


def test_an_unknown_stage_names_the_nearest(toy: Path) -> None:
    with pytest.raises(ConfigError, match="stage 'preferences'"):
        recipes.build({"stage": "preferences"})


def test_no_stage_is_named_outside_its_file() -> None:
    """Kinds and stages are compared nowhere; only preference training knows its loss kto."""
    folder = Path(stage.__file__).parent
    for path in [*folder.glob("*.py"), folder.parent / "cli" / "train.py"]:
        text = path.read_text()
        for name in ("policy-gradient", "steerlm", "pretrain", "reward_pairs"):
            assert f'"{name}"' not in text, path
        assert "recipe.stage ==" not in text, path
