"""The modules that policy-gradient training runs: log-probabilities with entropies, and a critic's values.

Legend: N tokens of the row, P predicted tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron4.model.transformer import Transformer
from nemotron4.training.logprobs import token_logprobs_and_entropies
from nemotron4.training.packing import PackedRow
from nemotron4.training.scorer import LogprobScorer, RewardScorer


class PolicyScorer(LogprobScorer):
    """Log-probability and entropy of each token of the answers, (P, 2), nats, float32.

    Both are of softmax(logits / temperature), the distribution that rollouts are drawn from.
    """

    def __init__(self, net: Transformer, *, temperature: float = 1.0) -> None:
        super().__init__(net)
        self.temperature = temperature

    def read(self, hidden_ND: Tensor, row: PackedRow) -> Tensor:
        hidden_PD = hidden_ND[row.predict_P] / self.temperature
        return token_logprobs_and_entropies(hidden_PD, self.net.lm_head.weight, row.target_P)

    def shape(self, row: PackedRow) -> torch.Size:
        return torch.Size((*row.target_P.shape, 2))


class ValueScorer(RewardScorer):
    """The critic's value before each token of the answers, (P,), float32."""

    def read(self, hidden_ND: Tensor, row: PackedRow) -> Tensor:
        values_P1: Tensor = self.net(hidden_ND[row.predict_P])
        return values_P1[:, 0].clone()  # FSDP2 must not be handed a view

    def shape(self, row: PackedRow) -> torch.Size:
        return row.target_P.shape
