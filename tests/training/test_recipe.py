"""The shipped recipes are what the strict loader accepts."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from nemotron4.checkpoint import open_checkpoint
from nemotron4.cli.main import main
from nemotron4.errors import ConfigError, DataError
from nemotron4.model.reward_head import CARD_WEIGHTS
from nemotron4.training import chain, run_chain, stage
from nemotron4.training import recipe as recipes
from nemotron4.training.encoding import Encoder
from nemotron4.training.inputs import encoded
from nemotron4.training.preview import preview_all
from nemotron4.training.reading import TrainingSource
from nemotron4.training.schedule import plan_steps
from nemotron4.training.synonyms import synonyms
from tests import tiny_models

FOLDER = Path(__file__).parents[2] / "recipes"
# Of `synth` and `recipe`, and words.
OTHERS = re.compile(r"synth/|synth\.toml|rounds\.toml|recipe\.toml|_data\.toml|phrases\.toml")
SHIPPED = sorted(path for path in FOLDER.rglob("*.toml") if not OTHERS.search(str(path.relative_to(FOLDER))))
PUBLISHED = [path for path in SHIPPED if path.parent.name == "nemotron4-340b"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_shipped_recipe_loads(path: Path) -> None:
    for recipe in chain.load(path):
        assert recipe.run.directory.parts[0] == "runs"


def test_the_published_values_are_the_reports() -> None:
    code, general, dpo, reward, ppo = (
        recipes.load(FOLDER / "nemotron4-340b" / f"{name}.toml")
        for name in ("code-sft", "general-sft", "dpo", "reward", "ppo")
    )
    assert (code.optimizer.learning_rate, code.batch.global_size, code.run.epochs) == (3e-7, 128, 1)
    assert (general.batch.global_size, general.run.epochs) == (128, 3)
    assert 1e-7 <= general.optimizer.learning_rate <= 5e-7
    assert 3e-4 <= dpo.settings.beta <= 3e-3
    assert 3e-8 <= dpo.optimizer.learning_rate <= 3e-7
    assert dpo.batch.global_size == 256
    assert (reward.optimizer.learning_rate, reward.batch.global_size, reward.run.epochs) == (7e-7, 128, 2)
    assert (reward.optimizer.warmup_steps, reward.run.result) == (10, "best")
    assert len(plan_steps(reward, num_samples=20_324).sizes) == 318  # the 318th is what is left of two epochs
    assert (ppo.settings.num_prompts, ppo.optimizer.learning_rate, ppo.settings.kl_coefficient) == (
        128,
        1e-7,
        3e-3,
    )
    means = {
        "helpfulness": 2.866,
        "correctness": 2.964,
        "coherence": 3.639,
        "complexity": 1.705,
        "verbosity": 2.0,
    }
    assert ppo.settings.rewards[0].shift == pytest.approx(
        sum(CARD_WEIGHTS[name] * mean for name, mean in means.items()), abs=1e-3
    )


def test_the_three_rounds_of_rpo_each_start_from_the_model_before() -> None:
    start = "runs/340b-dpo/model"
    for number in (1, 2, 3):
        rpo = recipes.load(FOLDER / "nemotron4-340b" / f"rpo-{number}.toml")
        assert rpo.model.start == start
        assert (rpo.settings.eta, rpo.settings.sft_weight, rpo.optimizer.learning_rate) == (1.0, 1e-5, 3e-7)
        assert 1e-3 <= rpo.settings.beta <= 1
        start = str(rpo.output_folder)


SOURCES = ("TR", "HS2", "NA", "not published", "ours", "HelpSteer", "published weights", "base")
NAMES = (
    "stage",
    "start",
    "shape",
    "preset",
    "tokenizer",
    "train",
    "validation",
    "directory",
    "name",
    "kind",
    "model",
)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_every_published_value_has_its_source_or_says_that_there_is_none(path: Path) -> None:
    table = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            table = line
        name = line.split("=")[0].strip()
        if "=" not in line or line.startswith("#") or name in NAMES or table.startswith("[parallel]"):
            continue
        assert any(source in line.partition("#")[2] for source in SOURCES) or name == "shift", line


def test_the_base_is_trained_on_8_trillion_tokens_in_the_reports_steps() -> None:
    recipe = recipes.load(FOLDER / "nemotron4-340b" / "pretrain.toml")
    sizes = plan_steps(recipe, num_samples=1).sizes
    assert recipe.data.max_length * sum(sizes) == pytest.approx(8e12, rel=1e-6)
    # Table 2 of the report: 200 B tokens at 768 and at 1,536 sequences, 7,600 B at 2,304.
    tokens = {size: recipe.data.max_length * size * num for size, num in Counter(sizes).items()}
    assert tokens == pytest.approx({768: 2e11, 1536: 2e11, 2304: 7.6e12}, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("max_steps=3", "run.max_steps"), ("optimizer.epochs=3", "run.epochs"),
        ("beta=0.1", "preference.beta"), ("run.lr=1", "optimizer.learning_rate"),
        ("batch.rank=8", "adapter.rank"),
    ],
)  # fmt: skip
def test_a_setting_in_the_wrong_table_is_told_its_own(change: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipes.load(FOLDER / "smollm2" / "dpo.toml", [change])
    assert caught.value.hint == f"here it is {name}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("preference.beta=0", "beta is 0"),
        ("reward.objective=regression", "no meaning in stage preference"),
        ("batch.ramp=[[9, 1], [3, 2]]", "ascending"),
        ("model.preset=nano", "exactly one of start and preset"),
        ("adapter.kind=lorra", "adapter.kind is 'lorra'"),
        ("optimizer.betas=[0.9]", "two numbers"),
        ("batch.row_tokens=1000", r"data.max_length \(1024\) is above batch.row_tokens \(1000\)"),
    ],
)
def test_an_impossible_setting_is_refused_before_anything_runs(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipes.load(FOLDER / "smollm2" / "dpo.toml", [change])


def test_a_length_on_the_command_line_replaces_the_files() -> None:
    path = FOLDER / "smollm2" / "dpo.toml"
    assert recipes.load(path).run.epochs == 1
    run = recipes.load(path, ["run.max_steps=3"]).run
    assert (run.max_steps, run.epochs) == (3, None)
    with pytest.raises(ConfigError, match="exactly one of max_steps and epochs"):
        recipes.load(path, ["run.max_steps=3", "run.epochs=1"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_shipped_recipe_is_checked_without_its_checkpoint(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEMOTRON4_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(path), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "is not here: checked with the shape" in shown
    assert "GB weights" in shown


def test_a_setting_that_the_loss_does_not_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEMOTRON4_CACHE", str(tmp_path))
    path = str(FOLDER / "smollm2" / "dpo.toml")
    for loss, is_named in (("dpo", True), ("rpo", False)):
        assert main(["train", path, "--dry-run", f"preference.loss={loss}", "preference.eta=2.0"]) == 0
        said = "preference.eta is ignored: loss rpo reads it, dpo does not"
        assert (said in capsys.readouterr().out) == is_named


SAMPLES = {
    "sft": ("sft", "sft_validation"),
    "prompts": ("prompts", "samples", "problems", "problems_validation"),
    "preference": ("pairs",),
    "reward": ("reward", "reward_validation"),
    "steerlm": ("steerlm",),
    "pretrain": ("text", "text_validation"),
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_row_of_the_sample_data_trains(kind: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_models.nemotron_directory(tmp_path))
    encoder = Encoder(checkpoint.tokenizer(), checkpoint.prompt_format(), 8192)
    for name in SAMPLES[kind]:
        path = FOLDER / "smollm2" / "data" / f"{name}.jsonl"
        found = encoded(TrainingSource(path=str(path)), stage.kinds()[kind], encoder)
        assert found.problems == []
        assert len(found) == len(path.read_text().splitlines())


def test_a_chain_fails_at_once_where_a_later_stage_names_a_missing_file(tmp_path: Path) -> None:
    start = tiny_models.nemotron_directory(tmp_path / "start")
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "chain.toml").write_text(f"""
model = {{ start = "{start}", device = "cpu" }}
data.max_length = 128
optimizer.learning_rate = 1e-3
batch.row_tokens = 128
run = {{ directory = "{tmp_path / "chain"}", epochs = 1 }}
[[stage]]
name = "sft"
kind = "sft"
data.train = ["{tmp_path / "rows.jsonl"}"]
[[stage]]
name = "dpo"
kind = "preference"
data.train = ["{tmp_path / "missing.jsonl"}"]
preference = {{ loss = "dpo", beta = 0.1 }}
""")
    stages = chain.load(tmp_path / "chain.toml")
    for look in (run_chain.run, preview_all):
        with pytest.raises(DataError, match=r"stage 2 of 2: .*missing\.jsonl"):
            look(stages)
    assert not (tmp_path / "chain").exists()


def test_a_run_larger_than_the_machine_is_refused_before_it_starts(tmp_path: Path) -> None:
    start = tiny_models.nemotron_directory(tmp_path / "start")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    values = {
        "stage": "pretrain",
        "model": {"preset": "nemotron4-340b", "tokenizer": str(start), "device": "cpu"},
        "data": {"train": [str(tmp_path / "rows.jsonl")]},
        "optimizer": {"learning_rate": 1e-3},
        "run": {"directory": str(tmp_path / "run"), "max_steps": 1},
    }
    with pytest.raises(ConfigError, match=r"need \d+\.\d GB on each process, and there are"):
        run_chain.run([recipes.build(values)])


@pytest.mark.parametrize("kind", sorted(name for each in stage.all_stages() for name in each.examples))
def test_a_new_recipe_is_whole_and_has_every_setting(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.toml"
    command = ["train", str(path), "--new", kind, "model.start=runs/x/model", 'data.train=["a.jsonl"]']
    assert main(command) == 0
    (made,) = chain.load(path)
    assert made.model.start == "runs/x/model"
    assert made.data.train == ("a.jsonl",)
    text = path.read_text()
    assert "# warmup_steps = 10" in text
    assert "# [adapter]" in text
    assert "# [samples]" in text
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "b.toml"), "--new", "dpoo"]) == 1
    assert "did you mean 'dpo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "name", "ours"),
    [
        ("policy_gradient", "gamma", "policy_gradient.discount"),
        ("policy_gradient", "loss_type", "policy_gradient.loss_over"),
        ("preference", "loss_type", "preference.loss"),
        ("preference", "num_generations", "preference.rollouts.group_size"),
        ("sft", "load_in_4bit", 'model.quantize = "nf4"'),
    ],
)
def test_names_of_other_trainers_are_settings_of_the_stage(table: str, name: str, ours: str) -> None:
    assert synonyms(table)[name] == ours
