"""Chains: each stage starts from the one before, and a repeated command does only what is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nemotron4.errors import ConfigError, Nemotron4Error
from nemotron4.training import chain, run_chain
from nemotron4.training import run as training_run
from nemotron4.training.output import RECORD_FILE
from tests import tiny_models


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.nemotron_directory(tmp_path_factory.mktemp("start"))


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chain_file(folder: Path, start: Path) -> Path:
    question = [{"role": "user", "content": "Shall I compare thee?"}]
    chats = write(
        folder / "chats.jsonl",
        [{"messages": [*question, {"role": "assistant", "content": f"No {i}"}]} for i in range(4)],
    )
    pairs = write(
        folder / "pairs.jsonl",
        [
            {
                "prompt": question,
                "chosen": f"Yes {i}",
                "rejected": f"No {i}",
                "chosen_reward": 2,
                "rejected_reward": 1,
            }
            for i in range(4)
        ],
    )
    text = f"""
[model]
start = "{start}"
device = "cpu"
[data]
max_length = 100
[optimizer]
learning_rate = 1e-3
warmup_steps = 0
[batch]
global_size = 2
row_tokens = 300
[run]
directory = "{folder / "chain"}"
max_steps = 2
[[stage]]
name = "sft"
kind = "sft"
data.train = ["{chats}"]
[[stage]]
name = "dpo"
kind = "preference"
data.train = ["{pairs}"]
preference = {{ loss = "dpo", beta = 0.1 }}
[[stage]]
name = "rpo-1"
kind = "preference"
data.train = ["{pairs}"]
preference = {{ loss = "rpo", beta = 0.1 }}
"""
    (folder / "chain.toml").write_text(text)
    return folder / "chain.toml"


def first_loss(folder: Path) -> float:
    return float(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:
    """A chain that has run."""
    folder = tmp_path_factory.mktemp("finished")
    summary = run_chain.run(chain.load(chain_file(folder, start)))
    assert summary.output == folder / "chain" / "02-rpo-1" / "model"
    return folder


def test_each_stage_starts_from_the_model_before_it_and_takes_it_as_reference(
    folder: Path, start: Path
) -> None:
    runs = folder / "chain"
    assert [stage.model.start for stage in chain.load(folder / "chain.toml")] == [
        str(start), str(runs / "00-sft" / "model"), str(runs / "01-dpo" / "model")
    ]  # fmt: skip
    # A policy that equals its reference has the loss log 2, whatever the stage before did to the model.
    assert first_loss(runs / "01-dpo") == pytest.approx(0.6931472, abs=1e-5)
    # One reference file for each start.
    assert len(list(folder.glob(".reference-*.jsonl"))) == 2


def test_a_repeated_command_passes_over_finished_stages(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "chain").rglob(RECORD_FILE)}
    notes: list[str] = []
    run_chain.run(chain.load(folder / "chain.toml"), note=notes.append)
    assert notes.count("finished before") == 2
    after = {path: path.stat().st_mtime_ns for path in (folder / "chain").rglob(RECORD_FILE)}
    first, second, _ = sorted(before)
    assert (before[first], before[second]) == (after[first], after[second])


def test_a_stage_whose_start_was_trained_again_is_not_passed_over(tmp_path: Path, start: Path) -> None:
    path = chain_file(tmp_path, start)
    run_chain.run(chain.load(path))
    shutil.rmtree(tmp_path / "chain" / "00-sft")
    with pytest.raises(ConfigError, match=r"01-dpo is of another run: start.weights"):
        run_chain.run(chain.load(path, ["stage.0.optimizer.learning_rate=1e-2"]))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('model = "previous"', 'model = "nowhere"', "nowhere"),
        ('start = "previous"', 'start = "nowhere"', "nowhere"),
        (
            'kind = "reward_model", model = "previous"',
            'kind = "python", path = "no.py:score"',
            "no such file",
        ),
        ('kind = "reward_model", model = "previous"', 'kind = "pattern", pattern = "("', "pattern"),
    ],
)
def test_a_judge_that_is_not_there_is_told_before_the_first_stage_trains(
    tmp_path: Path, start: Path, old: str, new: str, message: str
) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": [{"role": "user", "content": "Hi?"}]}] * 2)
    path = chain_file(tmp_path, start)
    more = POLICY_STAGE.format(pairs=tmp_path / "pairs.jsonl", prompts=prompts)
    more = more.replace(', attribute = "helpfulness"', "").replace(old, new)
    path.write_text(path.read_text().replace("max_length = 100", "max_length = 200") + more)
    with pytest.raises(Nemotron4Error, match=f"stage 5 of 5.*{message}"):
        run_chain.run(chain.load(path))
    assert not (tmp_path / "chain").exists()


def test_changed_data_makes_a_stage_unfinished(tmp_path: Path, start: Path) -> None:
    stages = chain.load(chain_file(tmp_path, start))
    run_chain.run(stages[:1])
    assert run_chain.is_finished(stages[0])
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write("\n")
    assert not run_chain.is_finished(stages[0])


def test_stages_are_overridden_by_their_place(tmp_path: Path, start: Path) -> None:
    stages = chain.load(chain_file(tmp_path, start), ["stage.1.preference.beta=0.7", "batch.global_size=3"])
    assert stages[1].settings.beta == 0.7
    assert {stage.batch.global_size for stage in stages} == {3}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "sft"', 'kind = "policy-gradient"', r"needs a table \[policy_gradient\]"),
        ('name = "dpo"', 'name = "sft"', "no other stage has"),
        ("max_length = 100", "max_lenght = 100", "stage 'sft'.*unknown key 'data.max_lenght'"),
        ('kind = "sft"', "", "stage 'sft' has no kind"),
        ('kind = "sft"', 'kind = "sft"\nrun = 3', r"run is 3; expected a table \[run\]"),
        ("[model]", "[[stage]]\n[model]", "stage 0 has name None"),
    ],
)
def test_a_wrong_chain_is_refused(tmp_path: Path, start: Path, old: str, new: str, message: str) -> None:
    path = chain_file(tmp_path, start)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        chain.load(path)


POLICY_STAGE = """
[[stage]]
name = "reward"
kind = "reward"
data.train = ["{pairs}"]
reward = {{ objective = "bradley_terry" }}
[[stage]]
name = "ppo"
kind = "policy-gradient"
data.train = ["{prompts}"]
[stage.policy_gradient]
algorithm = "ppo"
num_prompts = 2
group_size = 1
max_new_tokens = 4
unfinished = "judge"
rewards = [{{ kind = "reward_model", model = "previous", attribute = "helpfulness" }}]
critic = {{ start = "previous" }}
"""


def test_a_policy_stage_takes_the_reward_stage_before_it_as_judge_and_critic(
    tmp_path: Path, start: Path
) -> None:
    question = [{"role": "user", "content": "Shall I compare thee?"}]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": question}] * 2)
    path = chain_file(tmp_path, start)
    text = path.read_text().replace("max_length = 100", "max_length = 200")
    text = text[: text.index('[[stage]]\nname = "dpo"')]
    path.write_text(text + POLICY_STAGE.format(pairs=tmp_path / "pairs.jsonl", prompts=prompts))
    stages = chain.load(path)
    folder = tmp_path / "chain"
    assert stages[2].model.start == str(folder / "00-sft" / "model")
    settings = stages[2].settings
    assert settings is not None
    reward_model = str(folder / "01-reward" / "model")
    assert (settings.rewards[0].model, settings.critic.start) == (reward_model, reward_model)
    summary = run_chain.run(stages)
    assert summary.output == folder / "02-ppo" / "model"
    lines = [json.loads(line) for line in (folder / "02-ppo" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["share_without_reward"] == 0
    assert lines[0]["critic_loss"] > 0


def test_previous_needs_a_reward_stage_before_it(tmp_path: Path, start: Path) -> None:
    path = chain_file(tmp_path, start)
    text = path.read_text() + POLICY_STAGE.format(pairs="pairs.jsonl", prompts="prompts.jsonl")
    path.write_text(text.replace('name = "reward"\nkind = "reward"', 'name = "sft-2"\nkind = "sft"').replace(
        'reward = { objective = "bradley_terry" }\n', ""
    ))  # fmt: skip
    with pytest.raises(
        ConfigError, match="stage 'ppo': model 'previous' is the model of a stage of kind reward"
    ):
        chain.load(path)


def test_the_start_is_opened_and_its_rows_are_read_once(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take seconds before the first step; what looks at all stages first hands them on."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("opened again")

    monkeypatch.setattr(training_run, "open_start", refuse)
    monkeypatch.setattr(training_run, "read_data", refuse)
    stages = chain.load(chain_file(tmp_path, start), [])
    assert run_chain.run(stages[:1]).output is not None
