"""A recipe's engine and judges, put together for the trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.feedback.generation import EngineGenerate
from nemotron4.feedback.scorers import HttpJudge, ModelJudge
from nemotron4.feedback.verifiers import verifier
from nemotron4.training.policy_settings import RewardSource
from nemotron4.training.recipe import Recipe
from nemotron4.training.rollouts import Answer, Judge, Outside, Verdict


def connect(recipe: Recipe, base: Checkpoint) -> Outside:
    """The engine for the recipe's model and the sum of its judges; see ``training.rollouts.Connect``."""
    assert recipe.policy_gradient is not None, "only policy-gradient stages ask for rollouts"
    sources = recipe.policy_gradient.rewards
    judges = [_judge(source, recipe.model.device) for source in sources]
    return Outside(EngineGenerate.of(base), WeightedJudges(sources, judges))


def _judge(source: RewardSource, device: str) -> Judge:
    if source.kind == "reward_model":
        return ModelJudge(source, device)
    return HttpJudge(source) if source.kind == "http" else verifier(source)


class WeightedJudges:
    """The sum of ``weight * (value - shift)``; an answer that one judge cannot judge has no reward."""

    def __init__(self, sources: Sequence[RewardSource], judges: Sequence[Judge]) -> None:
        self._sources = sources
        self._judges = judges
        self.identity = " ".join(judge.identity for judge in judges)

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        columns = [judge(answers) for judge in self._judges]
        return [self._sum(verdicts) for verdicts in zip(*columns, strict=True)]

    def _sum(self, verdicts: Sequence[Verdict]) -> Verdict:
        total = 0.0
        for source, verdict in zip(self._sources, verdicts, strict=True):
            if verdict.value is None:
                return Verdict(None, verdict.reason)
            if not math.isfinite(verdict.value):
                return Verdict(None, f"the reward of kind {source.kind!r} is {verdict.value}")
            total += source.weight * (verdict.value - source.shift)
        return Verdict(total)
