"""AdamW with moments of eight bits, and in main memory, against its own of 32."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemotron4.cluster.layout import OPTIMIZER_BYTES
from nemotron4.errors import ConfigError
from nemotron4.training import checks
from nemotron4.training.optimizer import (
    MOMENT_BYTES,
    OFFLOADED_BYTES,
    apply_gradients,
    build_optimizer,
    moments,
)
from nemotron4.training.output import fingerprint, run_facts
from nemotron4.training.recipe import OptimizerSection, build
from tests import tiny_models
from tests.training import tiny

WIDE = {"hidden_size": 64, "ffn_hidden_size": 128}  # matrices of 4,096 numbers and more are quantised


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    """The same operations one by one: compiling them takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def make_trainer(folder: Path, **settings: object) -> tiny.Trainer:
    return tiny.make_trainer(folder, scorer=tiny.logprob_scorer(**WIDE), **settings)  # type: ignore[arg-type]


def weights(trainer: tiny.Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.engine.trainable.items()}


def test_eight_bits_train_as_thirty_two_do_in_a_quarter_of_the_memory(tmp_path: Path) -> None:
    found = {}
    for kind in ("float32", "8bit"):
        trainer = make_trainer(tmp_path / kind, max_steps=8, moments=kind, learning_rate=0.01)
        trainer.run()
        found[kind] = weights(trainer), dict(moments(trainer.engine.trainable, trainer.optimizer))
    (wide, wide_state), (narrow, narrow_state) = found["float32"], found["8bit"]
    start = {name: p.detach() for name, p in tiny.logprob_scorer(**WIDE).net.named_parameters()}
    moved, apart = (
        torch.stack([(wide[name] - other[name]).norm() for name in wide]).norm() for other in (start, narrow)
    )
    assert 0 < apart < 0.6 * moved  # with quantised embeddings it is 1.2

    assert "exp_avg.lm_head.weight" in narrow_state, "by token: not quantised"
    matrix = "model.layers.0.mlp.up_proj.weight"
    size = sum(
        tensor.nbytes for name, tensor in narrow_state.items() if name.endswith(matrix) and "qmap" not in name
    )
    assert size - 4 == MOMENT_BYTES["8bit"] * wide[matrix].numel()  # without the step's number
    assert wide_state[f"exp_avg.{matrix}"].nbytes * 2 == MOMENT_BYTES["float32"] * wide[matrix].numel()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", max_steps=4, moments="8bit")
    whole.run()
    first = make_trainer(tmp_path / "cut", max_steps=4, save_every=2, moments="8bit")
    first.on_progress = lambda progress: first.stop_requested.set() if progress.step == 2 else None
    assert first.run() == 2
    second = make_trainer(tmp_path / "cut", max_steps=4, save_every=2, moments="8bit")
    assert second.run() == 4
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(second).items())


@pytest.mark.parametrize("kind", ["float32", "offloaded"])
def test_gradients_are_clipped_to_the_norm_in_one_process(tmp_path: Path, kind: str) -> None:
    trainer = make_trainer(tmp_path, moments=kind)
    parameters = trainer.engine.trainable
    before = weights(trainer)
    rows = trainer.engine.rows(trainer.batch(0, 0), 4096)
    trainer.engine.forward_backward(rows, trainer.objective)
    norm = trainer.engine.grad_norm()
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    with torch.profiler.profile() as profile:
        apply_gradients(trainer.engine, trainer.optimizer, norm, 0.1, norm / 4)
    passes = {event.key for event in profile.key_averages()}
    assert "aten::mul_" not in passes, "AdamW's own pass over memory does it"
    state = dict(moments(parameters, trainer.optimizer))
    for name, gradient in gradients.items():
        # The first moment is 1 - beta of the gradient that the update saw.
        torch.testing.assert_close(state[f"exp_avg.{name}"], gradient * 0.25 * 0.1)
        assert not torch.equal(parameters[name], before[name])


def test_offloaded_moments_train_stop_and_go_on_as_those_next_to_the_model(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", max_steps=4)
    whole.run()
    first = make_trainer(tmp_path / "cut", max_steps=4, save_every=2, moments="offloaded")
    first.on_progress = lambda progress: first.stop_requested.set() if progress.step == 2 else None
    assert first.run() == 2
    for kind in ("float32", "offloaded"):
        shutil.copytree(tmp_path / "cut", tmp_path / kind)
        second = make_trainer(tmp_path / kind, max_steps=4, save_every=2, moments=kind)
        assert second.run() == 4
        assert second.tensors().keys() == whole.tensors().keys()
        expected = whole.tensors()
        assert all(torch.equal(value, expected[name]) for name, value in second.tensors().items())


def test_offloaded_moments_are_counted_in_main_memory_and_need_a_gpu(tmp_path: Path) -> None:
    start = tiny_models.nemotron_directory(tmp_path / "start")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    values = {
        "stage": "sft",
        "model": {"start": str(start), "device": "cpu"},
        "data": {"train": [str(rows)], "max_length": 32},
        "optimizer": {"learning_rate": 0.1, "moments": "offloaded"},
        "run": {"directory": str(tmp_path / "run"), "max_steps": 1},
    }
    recipe = build(values)
    with pytest.raises(ConfigError, match="moments = offloaded needs a GPU"):
        checks.check([recipe])
    [looked_at] = checks.check([recipe], by_shape=True)
    trained = looked_at.config.num_parameters
    assert looked_at.optimizer_bytes == 4 * trained, "gradients alone"
    assert any(f"{OFFLOADED_BYTES * trained / 1e9:.2f} GB of main memory" in note for note in looked_at.notes)
    # A run may go on with its moments in the other place.
    near = replace(recipe, optimizer=replace(recipe.optimizer, moments="float32"))
    assert looked_at.read is not None
    facts = [run_facts(each, looked_at.read, "weights") for each in (recipe, near)]
    assert fingerprint(facts[0]) == fingerprint(facts[1])


def test_the_memory_of_a_run_counts_its_moments(tmp_path: Path) -> None:
    config = tiny.config(**WIDE)
    wide, narrow = (
        checks.memory(tiny.make_recipe(tmp_path, moments=kind), config)[1] for kind in ("float32", "8bit")
    )
    assert wide == 12 * config.num_parameters
    assert narrow == int((4 + 2 + 2 / 64) * config.num_parameters)
    # Gradient and moments here, master weight and moments in a plan: both are four bytes beside them.
    assert {kind: 4 + size for kind, size in MOMENT_BYTES.items()} == OPTIMIZER_BYTES


def test_what_cannot_work_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("8bit", "offloaded"):
        with pytest.raises(ConfigError, match="one process"):
            tiny.make_recipe(tmp_path, moments=kind, data=2)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    parameters = dict(tiny.logprob_scorer().net.named_parameters())
    with pytest.raises(ConfigError, match="needs the package torchao"):
        build_optimizer(parameters, OptimizerSection(learning_rate=0.1, moments="8bit"))
