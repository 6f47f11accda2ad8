"""The objectives of policy gradients, on answers that were judged before.

Legend: P predicted tokens (here: tokens of answers), B answers, T tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemotron4.training import losses
from nemotron4.training.advantages import Row
from nemotron4.training.losses import SumCount
from nemotron4.training.packing import PackedRow
from nemotron4.training.rollout_settings import CriticSection, PolicyGradientSection
from nemotron4.training.samples import Sample
from nemotron4.training.scorer import trained_counts
from nemotron4.training.stage import Objective, Terms


@dataclass(frozen=True)
class AnswerSample(Sample):
    """Prompt and answer in one segment, and one number for each token of the answer in each field."""

    logprobs: Row = ()  # under the policy that is updated, before the step
    reference_logprobs: Row = ()  # empty without a reference
    advantages: Row = ()
    values: Row = ()  # the critic's, before the step
    returns: Row = ()
    weights: Row = ()  # of importance, where another policy wrote the answer


def _tokens(row: PackedRow, like: Tensor, numbers: Callable[[AnswerSample], Row]) -> Tensor:
    """One field of all answers of the row, (P,)."""
    found: list[float] = []
    for sample in row.samples:
        assert isinstance(sample, AnswerSample), "policy-gradient stages train on judged answers"
        found.extend(numbers(sample))
    assert len(found) == len(row.target_P), "one number for each token of each answer"
    return torch.tensor(found, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class _Answers:
    """The row's answers as the rows of a matrix."""

    row: PackedRow
    lengths: list[int]

    def matrix(self, values_P: Tensor) -> Tensor:
        """(B, T), zeros behind the answers' ends."""
        return pad_sequence(list(torch.split(values_P, self.lengths)), batch_first=True)

    def field(self, like: Tensor, numbers: Callable[[AnswerSample], Row]) -> Tensor:
        return self.matrix(_tokens(self.row, like, numbers))


@dataclass(frozen=True)
class ActorObjective(Objective):
    """The policy's loss: a clipped surrogate (PPO, GRPO and its kin) or REINFORCE.

    The divisor is the answers' tokens, or with ``loss_over`` answers or sums their number. Scores are (P, 2):
    log-probability and entropy of each token's distribution, at the rollouts' temperature.
    """

    settings: PolicyGradientSection

    def count(self, row: PackedRow) -> float:
        return float(len(row.target_P) if self.settings.loss_over == "tokens" else row.num_segments)

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        names = ("clip_fraction", "ratio", "entropy")
        if not row.samples:
            empty = SumCount(scores.sum() * 0.0, scores.new_zeros(()))
            return Terms(empty, dict.fromkeys(names, (0.0, 0.0)))
        settings = self.settings
        answers = _Answers(row, trained_counts(row).tolist())
        now_BT, entropy_BT = answers.matrix(scores[:, 0]), answers.matrix(scores[:, 1])
        mask_BT = answers.matrix(torch.ones_like(scores[:, 0])).bool()
        old_BT = answers.field(scores, lambda sample: sample.logprobs)
        advantages_BT = answers.field(scores, lambda sample: sample.advantages)
        loss = self._loss(now_BT, old_BT, advantages_BT, mask_BT, answers)
        total = loss.sum
        if settings.entropy_bonus:
            total = (
                total + losses.averaged(-settings.entropy_bonus * entropy_BT, mask_BT, settings.loss_over).sum
            )
        with torch.no_grad():
            ratio_BT = losses.policy_ratio(now_BT, old_BT, mask_BT, per=settings.ratio)
            clipped_BT = (ratio_BT > 1 + settings.clip_high) & (advantages_BT > 0)
            clipped_BT |= (ratio_BT < 1 - settings.clip_low) & (advantages_BT < 0)
            num = float(mask_BT.sum())
            sums = (clipped_BT.sum(), ratio_BT[mask_BT].sum(), entropy_BT.sum())
            totals = {name: (float(value), num) for name, value in zip(names, sums, strict=True)}
        return Terms(SumCount(total, loss.count), totals)

    def _loss(
        self, now_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, answers: _Answers
    ) -> SumCount:
        settings = self.settings
        more: dict[str, Any] = {"loss_over": settings.loss_over}
        if any(isinstance(sample, AnswerSample) and sample.weights for sample in answers.row.samples):
            more["weights_BT"] = answers.field(now_BT, lambda sample: sample.weights)
        if settings.algorithm == "reinforce":
            return losses.reinforce(now_BT, advantages_BT, mask_BT, **more)
        more |= {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
        if settings.algorithm == "ppo":
            return losses.ppo_actor(now_BT, old_BT, advantages_BT, mask_BT, **more)
        if settings.kl_coefficient:
            more["reference_logprobs_BT"] = answers.field(now_BT, lambda sample: sample.reference_logprobs)
        return losses.grpo(
            now_BT,
            old_BT,
            advantages_BT,
            mask_BT,
            kl_coefficient=settings.kl_coefficient,
            kl_estimator=settings.kl_estimator,
            ratio=settings.ratio,
            **more,
        )


@dataclass(frozen=True)
class CriticObjective(Objective):
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
