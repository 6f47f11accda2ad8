"""Supervised fine-tuning and pre-training: likelihood of the trained tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron4.training import losses
from nemotron4.training.packing import PackedRow
from nemotron4.training.stages.interface import Stage, Terms


class LikelihoodStage(Stage):
    """Mean negative log-likelihood over all trained tokens of the step."""

    has_known_slope = True

    def count(self, row: PackedRow) -> float:
        return float(len(row.target_P))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        return Terms(losses.sft(scores[None], torch.ones_like(scores, dtype=torch.bool)[None]))
