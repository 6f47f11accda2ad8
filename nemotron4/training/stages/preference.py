"""Preference training: DPO, IPO, RPO and KTO against cached reference log-probabilities.

Legend: P predicted tokens, S segments, B samples (pairs, or judged answers for KTO).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemotron4.training import losses
from nemotron4.training.losses import SumCount
from nemotron4.training.packing import PackedRow
from nemotron4.training.recipe import PreferenceSection
from nemotron4.training.scorer import segment_logprobs, trained_counts
from nemotron4.training.stages.interface import AddUp, Score, Stage, Terms, Totals, means


def _reference(row: PackedRow, scores: Tensor) -> Tensor:
    """Reference log-probability of each segment, (S,)."""
    values = [value for sample in row.samples for value in sample.reference]
    assert len(values) == row.num_segments, "reference log-probabilities are computed before training"
    return torch.tensor(values, dtype=scores.dtype, device=scores.device)


def _labels(row: PackedRow, scores: Tensor) -> Tensor:
    return torch.tensor([sample.labels for sample in row.samples], dtype=scores.dtype, device=scores.device)


@dataclass(frozen=True)
class PairStage(Stage):
    """Samples are (chosen, rejected); labels are the two rewards for RPO, nothing for DPO and IPO."""

    settings: PreferenceSection

    def count(self, row: PackedRow) -> float:
        return float(len(row.samples))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        settings = self.settings
        sums_B2 = segment_logprobs(scores, row).view(len(row.samples), 2)
        reference_B2 = _reference(row, scores).view(len(row.samples), 2)
        counts_B2 = trained_counts(row).view(len(row.samples), 2).clamp(min=1).to(scores.dtype)
        divisor_B2 = counts_B2 if settings.average_logprobs else torch.ones_like(counts_B2)
        policy_B2, reference_B2 = sums_B2 / divisor_B2, reference_B2 / divisor_B2
        policy_margin_B = policy_B2[:, 0] - policy_B2[:, 1]
        reference_margin_B = reference_B2[:, 0] - reference_B2[:, 1]
        reward_margin_B = self._reward_margin(row, scores)
        loss = self._pair_loss(policy_margin_B, reference_margin_B, reward_margin_B)
        total = settings.preference_weight * loss.sum
        if settings.sft_weight:
            total = total - settings.sft_weight * policy_B2[:, 0].sum()
        with torch.no_grad():
            totals = _pair_totals(
                policy_B2, reference_B2, sums_B2, reward_margin_B, counts_B2, settings, float(loss.sum)
            )
        return Terms(SumCount(total, loss.count), totals)

    def _reward_margin(self, row: PackedRow, scores: Tensor) -> Tensor | None:
        if not row.samples or not all(len(sample.labels) == 2 for sample in row.samples):
            assert self.settings.loss != "rpo" or not row.samples, (
                "RPO rows are checked for rewards when read"
            )
            return None
        labels_B2 = _labels(row, scores)
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


def _pair_totals(
    policy_B2: Tensor,
    reference_B2: Tensor,
    sums_B2: Tensor,
    reward_margin_B: Tensor | None,
    counts_B2: Tensor,
    settings: PreferenceSection,
    preference_loss: float,
) -> Totals:
    ratio_B2 = policy_B2 - reference_B2
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


@dataclass(frozen=True)
class JudgedStage(Stage):
    """KTO. Samples are (own answer, another row's answer to the same prompt); the label is 1 or 0.

    The second segment only serves the baseline z0, which belongs to the whole step.
    """

    settings: PreferenceSection
    baseline: float = 0.0

    def count(self, row: PackedRow) -> float:
        return float(len(row.samples))

    def _log_ratios(self, scores: Tensor, row: PackedRow) -> tuple[Tensor, Tensor]:
        policy_B2 = segment_logprobs(scores, row).view(len(row.samples), 2)
        reference_B2 = _reference(row, scores).view(len(row.samples), 2)
        if self.settings.average_logprobs:
            counts_B2 = trained_counts(row).view(len(row.samples), 2).clamp(min=1).to(scores.dtype)
            policy_B2, reference_B2 = policy_B2 / counts_B2, reference_B2 / counts_B2
        return policy_B2, reference_B2

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        policy_B2, reference_B2 = self._log_ratios(scores, row)
        is_desirable_B = _labels(row, scores).view(-1) > 0.5
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

    def prepare(self, rows: Sequence[PackedRow], score: Score, add_up: AddUp) -> Stage:
        total = num = 0.0
        for row in rows:
            policy_B2, reference_B2 = self._log_ratios(score(row), row)
            total += float((policy_B2 - reference_B2)[:, 1].sum())
            num += len(row.samples)
        total, num = add_up([total, num])
        return replace(self, baseline=max(0.0, total / num) if num else 0.0)
