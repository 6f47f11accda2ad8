"""Preference pairs of the policy's own answers: generate, judge, train, repeat.

One step answers its prompts, and of each the best and the worst answer by reward are a pair, whose rewards
are the labels (RPO). The reference is the stage's start, so a chain of such stages is iterated DPO or RPO:
each round begins from the model before, as start and as reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from nemotron4.training import parallel
from nemotron4.training.judged import Judged, differ, groups_of, reward_of
from nemotron4.training.loading import Origin
from nemotron4.training.rollout_trainer import RolloutTrainer
from nemotron4.training.rollouts import Connect
from nemotron4.training.samples import Sample
from nemotron4.training.sharded import Grid


class OnlinePairTrainer(RolloutTrainer):
    """A trainer on pairs that it makes itself."""

    def _samples(self, answers: Sequence[Judged]) -> list[Sample]:
        """The pair of each prompt whose answers have different rewards; of equal ones the first counts."""
        pairs = []
        for group in groups_of(answers):
            if differ(group):
                best = max(group, key=reward_of)
                worst = min(group, key=reward_of)
                pairs.append(_pair(best, worst))
        return pairs


def _pair(*answers: Judged) -> Sample:
    return Sample(
        tuple(answer.sample.segments[0] for answer in answers),
        labels=tuple(reward_of(answer) for answer in answers),
        where=answers[0].sample.where,
        reference=tuple(sum(answer.sample.reference_logprobs) for answer in answers),
    )


def online_pair_trainer(
    origin: Origin, grid: Grid | None, device: torch.device, connect: Connect
) -> Callable[..., OnlinePairTrainer]:
    """A trainer with judges, and with the start as a second, frozen model unless an adapter trains."""
    backend = connect(origin.recipe, origin.base)
    reference = None
    if origin.recipe.adapter is None:
        reference = parallel.build(origin, grid, device, is_frozen=True)
    return partial(
        OnlinePairTrainer,
        backend=backend,
        identity=[backend.judge.identity],
        skeleton=origin.policy,
        reference=reference,
    )
