"""Reward models: regression on attributes, or Bradley-Terry on pairs.

Legend: S segments, A attributes, B samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nemotron4.training import losses
from nemotron4.training.packing import PackedRow
from nemotron4.training.stages.interface import Stage, Terms


@dataclass(frozen=True)
class RegressionStage(Stage):
    """Labels are one number for each output, -100 where there is none; the divisor is the labelled cells."""

    attribute_names: tuple[str, ...]

    def count(self, row: PackedRow) -> float:
        return float(sum(label != losses.MISSING_LABEL for sample in row.samples for label in sample.labels))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        labels_SA = torch.tensor(
            [sample.labels for sample in row.samples], dtype=scores.dtype, device=scores.device
        ).view(scores.shape)
        loss = losses.reward_regression(scores, labels_SA)
        with torch.no_grad():
            has_label_SA = labels_SA != losses.MISSING_LABEL
            errors_A = ((scores - labels_SA).square() * has_label_SA).sum(dim=0)
            totals = {
                f"squared_error_{name}": (float(error), float(count))
                for name, error, count in zip(
                    self.attribute_names, errors_A, has_label_SA.sum(dim=0), strict=True
                )
            }
        return Terms(loss, totals)


@dataclass(frozen=True)
class BradleyTerryStage(Stage):
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
