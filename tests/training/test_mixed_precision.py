"""16-bit products in one process against FSDP2's, which do the same over several."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from nemotron4.training import parallel
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.objectives import LikelihoodObjective, RegressionObjective
from nemotron4.training.optimizer import apply_gradients, build_optimizer
from nemotron4.training.recipe import OptimizerSection, ParallelSection
from nemotron4.training.scorer import Scorer, checkpoint_activations
from nemotron4.training.sharded import Grid, whole
from nemotron4.training.stage import Objective
from tests.training import tiny

CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[Grid]:
    """A group of one process, as FSDP2 wants one."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield parallel.build_grid(ParallelSection(), "cpu")
    dist.destroy_process_group()


def trained(engine: TrainingEngine, objective: Objective, samples: list[tiny.Sample]) -> list[float]:
    """The losses of four steps of several packed rows each."""
    optimizer = build_optimizer(engine.trainable, OptimizerSection(learning_rate=0.01))
    losses = []
    for _ in range(4):
        losses.append(engine.forward_backward(engine.rows(samples, 24), objective).loss)
        apply_gradients(engine, optimizer, engine.grad_norm(), 0.01, 1.0)
    return losses


@pytest.mark.parametrize("kind", ["tied", "untied", "checkpointed", "reward"])
def test_one_process_trains_as_fsdp2_does(alone: Grid, kind: str) -> None:
    is_reward = kind == "reward"
    scorer: Scorer = tiny.reward_scorer() if is_reward else tiny.logprob_scorer(tie_embeddings=kind == "tied")
    objective = RegressionObjective(("a", "b", "c")) if is_reward else LikelihoodObjective()
    samples = tiny.scored(6) if is_reward else tiny.texts(6)
    if kind == "checkpointed":
        checkpoint_activations(scorer.net.model)
    twin = parallel.distribute(copy.deepcopy(scorer), alone, CPU, compute=torch.bfloat16)
    engine = parallel.distribute(scorer, None, CPU, compute=torch.bfloat16)
    assert len(engine.rows(samples, 24)) > 1, "gradients of several rows are added"
    own = dict(engine.trainable)

    assert trained(engine, objective, samples) == pytest.approx(trained(twin, objective, samples), rel=1e-3)

    for (name, mine), theirs in zip(engine.trainable.items(), twin.trainable.values(), strict=True):
        assert mine is own[name]
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.detach(), whole(theirs.detach()), rtol=1e-3, atol=1e-3)


def test_scores_follow_the_weights_and_leave_them_alone() -> None:
    engine = parallel.distribute(tiny.logprob_scorer(), None, CPU, compute=torch.bfloat16)
    (row,) = engine.rows(tiny.texts(2), 64)
    before = engine.score(row)
    with torch.no_grad():
        engine.scorer.net.lm_head.weight.mul_(2)  # type: ignore[union-attr,operator]
    assert not torch.equal(engine.score(row), before)
    again = parallel.distribute(engine.scorer, None, CPU, compute=torch.bfloat16)
    assert torch.equal(engine.score(row), again.score(row))
    assert all(p.grad is None for p in engine.trainable.values())
