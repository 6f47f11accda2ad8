"""The modules that policy-gradient training runs: log-probabilities with entropies, and a critic's values.

Legend: N tokens of the row, P predicted tokens, D hidden size, V vocabulary, c tokens of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemotron4.model.transformer import Transformer
from nemotron4.training.logprobs import CHUNK_TOKENS
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
        hidden_PD = hidden_ND[row.predict_P]
        # Like token_logprobs, one chunk of logits at a time, in the backward pass again.
        parts = [
            checkpoint(
                _logprob_and_entropy,
                hidden_PD[start : start + CHUNK_TOKENS],
                self.net.lm_head.weight,
                row.target_P[start : start + CHUNK_TOKENS],
                self.temperature,
                use_reentrant=False,
            )
            for start in range(0, len(hidden_PD), CHUNK_TOKENS)
        ]
        return torch.cat([*parts, hidden_PD.new_empty((0, 2), dtype=torch.float32)])

    def shape(self, row: PackedRow) -> torch.Size:
        return torch.Size((*row.target_P.shape, 2))


def _logprob_and_entropy(
    hidden_cD: Tensor, weight_VD: Tensor, target_c: Tensor, temperature: float
) -> Tensor:
    logprobs_cV = torch.log_softmax((hidden_cD @ weight_VD.T).float() / temperature, dim=-1)
    chosen_c = logprobs_cV.gather(1, target_c[:, None])[:, 0]
    entropy_c = -(logprobs_cV.exp() * logprobs_cV).sum(dim=-1)
    return torch.stack((chosen_c, entropy_c), dim=1)


class ValueScorer(RewardScorer):
    """The critic's value before each token of the answers, (P,), float32."""

    def read(self, hidden_ND: Tensor, row: PackedRow) -> Tensor:
        values_P1: Tensor = self.net(hidden_ND[row.predict_P])
        return values_P1[:, 0]

    def shape(self, row: PackedRow) -> torch.Size:
        return row.target_P.shape
