"""Policy-gradient objectives on answers that were generated and judged before.

Legend: P predicted tokens (here: tokens of answers), B answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron4.training import losses
from nemotron4.training.losses import SumCount
from nemotron4.training.packing import PackedRow, Sample
from nemotron4.training.policy_settings import CriticSection, PolicyGradientSection
from nemotron4.training.stages.interface import Stage, Terms

Row = tuple[float, ...]


@dataclass(frozen=True)
class AnswerSample(Sample):
    """Prompt and answer in one segment, and one number for each token of the answer in each field."""

    logprobs: Row = ()  # under the policy that wrote it
    reference_logprobs: Row = ()  # empty without a reference
    advantages: Row = ()
    values: Row = ()  # the critic's, before the step
    returns: Row = ()


def _tokens(row: PackedRow, like: Tensor, numbers: Callable[[AnswerSample], Row]) -> Tensor:
    """One field of all answers of the row, (P,)."""
    found: list[float] = []
    for sample in row.samples:
        assert isinstance(sample, AnswerSample), "policy-gradient stages train on judged answers"
        found.extend(numbers(sample))
    assert len(found) == len(row.target_P), "one number for each token of each answer"
    return torch.tensor(found, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class ActorStage(Stage):
    """The policy's loss: PPO's or GRPO's clipped surrogate, or REINFORCE; the divisor is the answers' tokens.

    Scores are (P, 2): log-probability and entropy of each token's distribution, at the rollouts' temperature.
    """

    settings: PolicyGradientSection

    def count(self, row: PackedRow) -> float:
        return float(len(row.target_P))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        logprobs_P, entropy_P = scores[:, 0], scores[:, 1]
        old_P = _tokens(row, scores, lambda sample: sample.logprobs)
        advantages_P = _tokens(row, scores, lambda sample: sample.advantages)
        loss = self._loss(logprobs_P, old_P, advantages_P, row)
        total = loss.sum
        if self.settings.entropy_bonus:
            total = total - self.settings.entropy_bonus * entropy_P.sum()
        with torch.no_grad():
            ratio_P = (logprobs_P - old_P).exp()
            clipped_P = (ratio_P > 1 + self.settings.clip_high) & (advantages_P > 0)
            clipped_P |= (ratio_P < 1 - self.settings.clip_low) & (advantages_P < 0)
            num = float(len(ratio_P))
            totals = {
                "clip_fraction": (float(clipped_P.sum()), num),
                "ratio": (float(ratio_P.sum()), num),
                "entropy": (float(entropy_P.sum()), num),
            }
        return Terms(SumCount(total, loss.count), totals)

    def _loss(self, logprobs_P: Tensor, old_P: Tensor, advantages_P: Tensor, row: PackedRow) -> SumCount:
        settings = self.settings
        # To the losses every token is a row of one: advantages are per token already.
        mask_P1 = torch.ones_like(logprobs_P, dtype=torch.bool)[:, None]
        now_P1, old_P1 = logprobs_P[:, None], old_P[:, None]
        if settings.algorithm == "reinforce":
            return losses.reinforce(now_P1, advantages_P, mask_P1)
        clip = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
        if settings.algorithm == "ppo":
            return losses.ppo_actor(now_P1, old_P1, advantages_P[:, None], mask_P1, **clip)
        reference_P1 = None
        if settings.kl_coefficient:
            reference_P1 = _tokens(row, logprobs_P, lambda sample: sample.reference_logprobs)[:, None]
        return losses.grpo(
            now_P1,
            old_P1,
            advantages_P,
            mask_P1,
            reference_logprobs_BT=reference_P1,
            kl_coefficient=settings.kl_coefficient,
            **clip,
        )


@dataclass(frozen=True)
class CriticStage(Stage):
    """PPO's value loss; scores are one value for each token of the answers, (P,)."""

    settings: CriticSection

    def count(self, row: PackedRow) -> float:
        return float(len(row.target_P))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        old_P = _tokens(row, scores, lambda sample: sample.values)
        returns_P = _tokens(row, scores, lambda sample: sample.returns)
        mask_P1 = torch.ones_like(scores, dtype=torch.bool)[:, None]
        loss = losses.ppo_critic(
            scores[:, None], old_P[:, None], returns_P[:, None], mask_P1, clip=self.settings.value_clip
        )
        return Terms(loss)
