"""What the stages minimise; policy gradients have ``policy.py``.

Legend: P predicted tokens, S segments, A attributes, B samples (pairs, or judged answers for KTO),
K answers to one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nemotron4.training import losses
from nemotron4.training.losses import SumCount
from nemotron4.training.packing import PackedRow
from nemotron4.training.preference_settings import PreferenceSection
from nemotron4.training.rows import MISSING
from nemotron4.training.scorer import segment_logprobs, trained_counts
from nemotron4.training.stage import AddUp, Objective, Score, Terms, Totals, means


class LikelihoodObjective(Objective):
    """Mean negative log-likelihood over all trained tokens of the step."""

    has_known_slope = True

    def count(self, row: PackedRow) -> float:
        return float(len(row.target_P))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        return Terms(losses.sft(scores[None], torch.ones_like(scores, dtype=torch.bool)[None]))


@dataclass(frozen=True)
class PairObjective(Objective):
    """Samples are (chosen, rejected); labels are the two rewards for RPO, nothing for DPO and IPO."""

    settings: PreferenceSection

    def count(self, row: PackedRow) -> float:
        return float(len(row.samples))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        settings = self.settings
        found = _logprobs_of_two(scores, row, settings)
        policy_B2, reference_B2 = found.policy_B2, found.reference_B2
        policy_margin_B = policy_B2[:, 0] - policy_B2[:, 1]
        reference_margin_B = reference_B2[:, 0] - reference_B2[:, 1]
        reward_margin_B = self._reward_margin(row, scores)
        loss = self._pair_loss(policy_margin_B, reference_margin_B, reward_margin_B)
        total = settings.preference_weight * loss.sum
        if settings.sft_weight:
            total = total - settings.sft_weight * policy_B2[:, 0].sum()
        with torch.no_grad():
            totals = _pair_totals(found, reward_margin_B, settings, float(loss.sum))
        return Terms(SumCount(total, loss.count), totals)

    def _reward_margin(self, row: PackedRow, scores: Tensor) -> Tensor | None:
        if not row.samples or not all(len(sample.labels) == 2 for sample in row.samples):
            assert self.settings.loss != "rpo" or not row.samples, (
                "RPO rows are checked for rewards when read"
            )
            return None
        labels_B2 = sample_labels(row, scores)
        return labels_B2[:, 0] - labels_B2[:, 1]

    def _pair_loss(self, policy_B: Tensor, reference_B: Tensor, reward_B: Tensor | None) -> SumCount:
        settings = self.settings
        if settings.loss == "dpo":
            return losses.dpo(policy_B, reference_B, beta=settings.beta)
        if settings.loss == "ipo":
            return losses.ipo(policy_B, reference_B, beta=settings.beta)
        target_B = torch.zeros_like(policy_B) if reward_B is None else reward_B
        return losses.rpo(
            policy_B, reference_B, target_B, beta=settings.beta, eta=settings.eta, distance=settings.distance
        )

    def summarise(self, totals: Totals) -> dict[str, float]:
        metrics = means(totals)
        correlation = _correlation(totals)
        return metrics if correlation is None else metrics | {"reward_correlation": correlation}

    def names(self, totals: Totals) -> set[str]:
        return super().names(totals) | {"reward_correlation"}


class _OfTwo(NamedTuple):
    """Of each sample's two answers: the policy's sums over tokens, the number of tokens, and what the loss
    compares, which is per token where the recipe says so.
    """

    sums_B2: Tensor
    counts_B2: Tensor
    policy_B2: Tensor
    reference_B2: Tensor


def _logprobs_of_two(scores: Tensor, row: PackedRow, settings: PreferenceSection) -> _OfTwo:
    shape = (len(row.samples), 2)
    sums_B2 = segment_logprobs(scores, row).view(shape)
    counts_B2 = trained_counts(row).view(shape).clamp(min=1).to(scores.dtype)
    divisor_B2 = counts_B2 if settings.average_logprobs else torch.ones_like(counts_B2)
    reference_B2 = reference_logprobs(row, scores).view(shape)
    return _OfTwo(sums_B2, counts_B2, sums_B2 / divisor_B2, reference_B2 / divisor_B2)


def _pair_totals(
    found: _OfTwo, reward_margin_B: Tensor | None, settings: PreferenceSection, preference_loss: float
) -> Totals:
    sums_B2, counts_B2 = found.sums_B2, found.counts_B2
    ratio_B2 = found.policy_B2 - found.reference_B2
    margin_B = settings.beta * (ratio_B2[:, 0] - ratio_B2[:, 1])
    num = float(len(ratio_B2))
    per_token = (ratio_B2 if settings.average_logprobs else ratio_B2 / counts_B2).mean(dim=1)
    totals = {
        "preference_loss": (preference_loss, num),
        "chosen_logprob": (float(sums_B2[:, 0].sum()), num),
        "rejected_logprob": (float(sums_B2[:, 1].sum()), num),
        "margin_beta": (float(margin_B.sum()), num),
        "accuracy": (float((ratio_B2[:, 0] > ratio_B2[:, 1]).sum()), num),
        "log_ratio_per_token": (float(per_token.sum()), num),
    }
    given = reward_margin_B is not None
    x, y = margin_B.double(), (reward_margin_B if reward_margin_B is not None else margin_B).double()
    for name, value in (("x", x), ("y", y), ("xx", x * x), ("yy", y * y), ("xy", x * y)):
        totals[f"_{name}"] = (float(value.sum()), num) if given else (0.0, 0.0)
    return totals


def _correlation(totals: Totals) -> float | None:
    """Pearson correlation of implicit and given reward margins; None where it is undefined."""
    if totals["_x"][1] < 2:
        return None
    x, y, xx, yy, xy = (totals[f"_{name}"][0] / totals["_x"][1] for name in ("x", "y", "xx", "yy", "xy"))
    spread = (xx - x * x) * (yy - y * y)
    return (xy - x * y) / math.sqrt(spread) if spread > 1e-24 else None


def reference_logprobs(row: PackedRow, scores: Tensor) -> Tensor:
    """Reference log-probability of each segment, (S,)."""
    values = [value for sample in row.samples for value in sample.reference]
    assert len(values) == row.num_segments, "reference log-probabilities are computed before training"
    return torch.tensor(values, dtype=scores.dtype, device=scores.device)


def sample_labels(row: PackedRow, scores: Tensor) -> Tensor:
    return torch.tensor([sample.labels for sample in row.samples], dtype=scores.dtype, device=scores.device)


@dataclass(frozen=True)
class JudgedObjective(Objective):
    """KTO. Samples are (own answer, another row's answer to the same prompt); the label is 1 or 0.

    The second segment only serves the baseline z0, which belongs to the whole step.
    """

    settings: PreferenceSection
    baseline: float = 0.0

    def count(self, row: PackedRow) -> float:
        return float(len(row.samples))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        found = _logprobs_of_two(scores, row, self.settings)
        policy_B2, reference_B2 = found.policy_B2, found.reference_B2
        is_desirable_B = sample_labels(row, scores).view(-1) > 0.5
        settings = self.settings
        loss = losses.kto(
            policy_B2[:, 0],
            reference_B2[:, 0],
            is_desirable_B,
            kl_baseline=self.baseline,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )
        with torch.no_grad():
            reward_B = settings.beta * (policy_B2[:, 0] - reference_B2[:, 0])
            good, bad = reward_B[is_desirable_B], reward_B[~is_desirable_B]
            totals = {
                "desirable_reward": (float(good.sum()), float(len(good))),
                "undesirable_reward": (float(bad.sum()), float(len(bad))),
                "kl_baseline": (self.baseline * len(row.samples), float(len(row.samples))),
            }
        return Terms(SumCount(settings.preference_weight * loss.sum, loss.count), totals)

    def prepare(self, rows: Sequence[PackedRow], score: Score, add_up: AddUp) -> Objective:
        total = num = 0.0
        for row in rows:
            found = _logprobs_of_two(score(row), row, self.settings)
            total += float((found.policy_B2 - found.reference_B2)[:, 1].sum())
            num += len(row.samples)
        total, num = add_up([total, num])
        return replace(self, baseline=max(0.0, total / num) if num else 0.0)


@dataclass(frozen=True)
class RegressionObjective(Objective):
    """Labels are one number for each output, -100 where there is none; the divisor is the labelled cells."""

    attribute_names: tuple[str, ...]

    def count(self, row: PackedRow) -> float:
        return float(sum(label != MISSING for sample in row.samples for label in sample.labels))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        labels_SA = torch.tensor(
            [sample.labels for sample in row.samples], dtype=scores.dtype, device=scores.device
        ).view(scores.shape)
        loss = losses.reward_regression(scores, labels_SA)
        with torch.no_grad():
            has_label_SA = labels_SA != MISSING
            errors_A = ((scores - labels_SA).square() * has_label_SA).sum(dim=0)
            totals = {
                f"squared_error_{name}": (float(error), float(count))
                for name, error, count in zip(
                    self.attribute_names, errors_A, has_label_SA.sum(dim=0), strict=True
                )
            }
        return Terms(loss, totals)


@dataclass(frozen=True)
class BradleyTerryObjective(Objective):
    """Samples are (chosen, rejected); the label, where the variant needs one, is the preference strength."""

    variant: Literal["regular", "margin", "scaled"]
    output: int  # column of the head that is trained

    def count(self, row: PackedRow) -> float:
        return float(len(row.samples))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        scores_B2 = scores[:, self.output].view(len(row.samples), 2)
        strength_B = None
        if self.variant != "regular":
            strength_B = torch.tensor(
                [sample.labels[0] for sample in row.samples], dtype=scores.dtype, device=scores.device
            )
        loss = losses.bradley_terry(
            scores_B2[:, 0], scores_B2[:, 1], strength_B=strength_B, variant=self.variant
        )
        with torch.no_grad():
            difference_B = scores_B2[:, 0] - scores_B2[:, 1]
            num = float(len(difference_B))
            totals = {
                "accuracy": (float((difference_B > 0).sum()), num),
                "score_margin": (float(difference_B.sum()), num),
                "chosen_score": (float(scores_B2[:, 0].sum()), num),
                "rejected_score": (float(scores_B2[:, 1].sum()), num),
            }
        return Terms(loss, totals)


class WeightedObjective(Objective):
    """Samples are the answers to one prompt; labels are log P(a|x,y), log P(y|x), log Q'(y|a,x) of each.

    The divisor is the number of prompts.
    """

    def count(self, row: PackedRow) -> float:
        return float(len(row.samples))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        sums_S = segment_logprobs(scores, row)
        lengths_S = trained_counts(row)
        total = scores.sum() * 0.0  # a row without samples has a gradient too
        distance = effective = 0.0
        at = 0
        for sample in row.samples:
            end = at + len(sample.segments)
            numbers_K3 = torch.tensor(sample.labels, dtype=scores.dtype, device=scores.device).view(-1, 3)
            found = losses.steerlm_weighted(
                sums_S[None, at:end],
                target_GK=numbers_K3[:, :2].sum(dim=1)[None],
                proposal_GK=numbers_K3[None, :, 2],
                mean_length_G=lengths_S[at:end].to(scores.dtype).mean()[None],
            )
            total = total + found.loss.sum
            distance += float(found.distance_G.detach())
            effective += float(found.effective_G)
            at = end
        num = float(len(row.samples))
        totals = {"distance": (distance, num), "effective_answers": (effective, num)}
        return Terms(SumCount(total, torch.tensor(num, dtype=scores.dtype)), totals)
