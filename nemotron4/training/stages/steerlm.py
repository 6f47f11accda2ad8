"""SteerLM 2.0: answers sampled for given attributes, weighted by how well they have them.

Legend: S segments, K answers to one prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron4.training import losses
from nemotron4.training.losses import SumCount
from nemotron4.training.packing import PackedRow
from nemotron4.training.scorer import segment_logprobs, trained_counts
from nemotron4.training.stages.interface import Stage, Terms


class WeightedStage(Stage):
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
