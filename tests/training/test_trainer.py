"""The loop: what it records, that it learns, and that an interrupted run is the uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemotron4.errors import CheckpointError, ConfigError, TrainingError
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapters import add_adapter
from nemotron4.training import checkpoints
from nemotron4.training.metrics import Part
from nemotron4.training.schedule import plan_steps
from nemotron4.training.trainer import StepRecord, Trainer
from tests.training import tiny
from tests.training.tiny import make_recipe, make_trainer


def curve(folder: Path) -> list[dict[str, float]]:
    """Every recorded number that does not depend on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    machine = ("seconds", "tokens_per_s", "memory_gb", "mfu")
    return [{k: v for k, v in json.loads(line).items() if k not in machine} for line in lines]


def weights(folder: Path, trainer: Trainer) -> dict[str, torch.Tensor]:
    path = checkpoints.newest(folder / "checkpoints")
    assert path is not None
    tensors = {name: torch.zeros_like(t) for name, t in trainer.tensors().items()}
    checkpoints.load(path, tensors)
    return tensors


def test_a_validation_tells_how_far_it_is(tmp_path: Path) -> None:
    parts: list[Part] = []
    trainer = make_trainer(tmp_path, max_steps=1, row_tokens=40)
    trainer.validation = tuple(tiny.texts(12, seed=9))
    trainer.on_part = parts.append
    trainer.run()
    assert len(parts) > 1
    assert [(part.name, part.done) for part in parts] == [
        ("validation rows", n + 1) for n in range(len(parts))
    ]
    assert {part.total for part in parts} == {len(parts)}


def test_training_lowers_the_loss_and_records_every_step(tmp_path: Path) -> None:
    seen: list[StepRecord] = []
    trainer = make_trainer(tmp_path, max_steps=12, learning_rate=1e-2, on_progress=seen.append)
    assert trainer.run() == 12
    lines = curve(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    assert lines[11]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["kind"] == "validation"
    assert len(seen) == len(lines)


def test_one_update_equals_adamw_written_out(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, warmup_steps=0, clip_norm=0.05, weight_decay=0.1)
    parameters = trainer.engine.trainable
    before = {name: p.detach().clone() for name, p in parameters.items()}
    samples = trainer.batch(0, 0)
    trainer.engine.forward_backward(trainer.engine.rows(samples, 4096), trainer.objective)
    grads = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    norm = float(torch.cat([g.flatten() for g in grads.values()]).norm())
    assert norm > 0.05
    trainer.run()
    settings = trainer.recipe.optimizer
    for name, parameter in parameters.items():
        g = grads[name] * 0.05 / norm
        decay = settings.weight_decay if g.dim() > 1 else 0.0
        step = settings.learning_rate * g / (g.abs() + settings.eps)  # the first step of Adam
        expected = before[name] * (1 - settings.learning_rate * decay) - step
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_resume_continues_the_same_loss_curve(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", max_steps=7)
    whole.run()
    stopped = make_trainer(tmp_path / "cut", max_steps=7)
    stopped.on_progress = lambda p: stopped.stop_requested.set() if p.step == 4 else None
    assert stopped.run() == 4
    resumed = make_trainer(tmp_path / "cut", max_steps=7)
    assert resumed.run() == 7
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole", whole).items():
        assert torch.equal(tensor, weights(tmp_path / "cut", resumed)[name]), name


def test_lora_with_dropout_resumes_the_same_curve(tmp_path: Path) -> None:
    def trainer(name: str) -> Trainer:
        scorer = tiny.logprob_scorer()
        add_adapter(scorer.net, AdapterConfig(kind="lora", rank=2, dropout=0.3), seed=0)
        return make_trainer(tmp_path / name, max_steps=6, scorer=scorer)

    trainer("whole").run()
    stopped = trainer("cut")
    stopped.on_progress = lambda p: stopped.stop_requested.set() if p.step == 3 else None
    stopped.run()
    trainer("cut").run()
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_killed_run_resumes_bit_identically(tmp_path: Path, moment: str) -> None:
    make_trainer(tmp_path / "whole", max_steps=8).run()
    program = (
        "import sys, pathlib\n"
        "from tests.training.tiny import run_until_killed\n"
        "run_until_killed(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
    )
    folder = tmp_path / "cut"
    process = subprocess.run(
        [sys.executable, "-c", program, str(folder), moment],
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": "."}, timeout=110, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL
    if moment == "save":
        assert list((folder / "checkpoints").glob(".partial-*"))
    make_trainer(folder, max_steps=8).run()
    assert curve(folder) == curve(tmp_path / "whole")
    assert not list((folder / "checkpoints").glob(".partial-*"))


def test_changed_data_is_not_taken_for_the_same_run(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2).run()
    with pytest.raises(ConfigError, match="another run"):
        make_trainer(tmp_path, max_steps=4, fingerprint="other").run()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=6, save_every=1).run()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000005", "step-00000006"]


def test_the_checkpoint_with_the_lowest_validation_loss_is_kept(tmp_path: Path) -> None:
    # So large a rate that validation gets worse after its best step.
    trainer = make_trainer(
        tmp_path,
        max_steps=6,
        save_every=1,
        validate_every=1,
        keep_checkpoints=1,
        learning_rate=0.3,
        clip_norm=0.0,
    )
    trainer.run()
    lines = [line for line in curve(tmp_path) if line["kind"] == "validation"]
    best = min(lines, key=lambda line: line["loss"])["step"]
    assert best < 6
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [f"step-{best:08d}", "step-00000006"]


def test_a_full_disk_leaves_the_last_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, max_steps=4, save_every=2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def fill_disk_at_step_3(progress: StepRecord) -> None:
        if progress.step == 3:
            trainer._writer.wait()  # step 2 is written meanwhile
            monkeypatch.setattr(checkpoints, "save_tensors", full)

    trainer.on_progress = fill_disk_at_step_3
    with pytest.raises(CheckpointError, match="no space left"):
        trainer.run()
    path = checkpoints.newest(tmp_path / "checkpoints")
    assert path is not None
    assert checkpoints.read_state(path).step == 2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=1).run()
    path = checkpoints.newest(tmp_path / "checkpoints")
    assert path is not None
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


def test_epochs_visit_every_sample_once_each_in_another_order() -> None:
    samples = tiny.texts(7)
    dataset = tiny.dataset(samples)
    first = [dataset.at(i).where for i in range(7)]
    second = [dataset.at(i).where for i in range(7, 14)]
    assert sorted(first) == sorted(second) == sorted(s.where for s in samples)
    assert first != second
    assert [dataset.at(i).where for i in range(7)] == first


def test_the_last_step_of_an_epoch_run_may_be_smaller(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, max_steps=None, epochs=2, global_size=4)
    assert plan_steps(recipe, 5).sizes == (4, 4, 2)


def test_the_batch_ramp_grows_the_steps(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, max_steps=5, global_size=2, ramp=((4, 3), (10, 6)))
    assert plan_steps(recipe, 100).sizes == (2, 2, 3, 3, 6)


def test_no_sample_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no sample"):
        plan_steps(make_recipe(tmp_path, max_steps=1), 0)


def test_a_mixture_draws_sources_by_weight_and_covers_each_in_turn() -> None:
    samples = tiny.texts(30)
    dataset = tiny.dataset(samples, source_sizes=(10, 20), weights=(3.0, 1.0))
    drawn = [int(dataset.at(i).where.split(":")[1]) for i in range(4000)]
    again = tiny.dataset(samples, source_sizes=(10, 20), weights=(3.0, 1.0))
    assert [int(again.at(i).where.split(":")[1]) for i in range(50)] == drawn[:50]
    small = [row for row in drawn if row <= 10]
    assert len(small) / len(drawn) == pytest.approx(0.75, abs=0.02)
    assert sorted(small[:10]) == list(range(1, 11))


def test_a_value_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    assert [trainer._is_best({"loss": value}, "loss") for value in (float("nan"), 2.0, float("nan"))] == [
        False, True, False,
    ]  # fmt: skip


def test_non_finite_gradients_stop_before_the_update(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=3)
    before = {name: p.detach().clone() for name, p in trainer.engine.trainable.items()}
    trainer.engine.grad_norm = lambda: float("inf")  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="no update was made"):
        trainer.run()
    for name, parameter in trainer.engine.trainable.items():
        assert torch.equal(parameter, before[name])
