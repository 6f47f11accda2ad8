"""The module that training runs: a packed row in, the numbers a loss needs out.

Everything goes through ``forward``, so that sharding, which hooks it, sees every use of a weight. A pipeline
stage calls the two halves (``hidden``, ``read``) from a ``forward`` of its own.

Legend: N tokens of the row, P predicted tokens, S segments, A attributes, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemotron4.model.attention import Attend, Rotation
from nemotron4.model.reward_head import RewardModel
from nemotron4.model.transformer import Block, Decoder, Transformer
from nemotron4.training.logprobs import token_logprobs, token_logprobs_and_entropies
from nemotron4.training.packing import PackedAttend, PackedRow


class LogprobScorer(nn.Module):
    """Log-probability of each trained token of a packed row, (P,), nats, float32."""

    def __init__(self, net: Transformer) -> None:
        super().__init__()
        self.net = net

    def forward(self, row: PackedRow) -> Tensor:
        return self.read(hidden(self.net, row.tokens_N, row), row)

    def read(self, hidden_ND: Tensor, row: PackedRow) -> Tensor:
        weight_VD = self.net.lm_head.weight
        return token_logprobs(hidden_ND[row.predict_P], weight_VD, row.target_P, slope=row.slope)

    def shape(self, row: PackedRow) -> torch.Size:
        return row.target_P.shape


class AttributeScorer(nn.Module):
    """Attribute scores at the last token of each segment, (S, A), float32."""

    def __init__(self, net: RewardModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, row: PackedRow) -> Tensor:
        return self.read(hidden(self.net, row.tokens_N, row), row)

    def read(self, hidden_ND: Tensor, row: PackedRow) -> Tensor:
        scores_SA: Tensor = self.net(hidden_ND[row.last_S])
        return scores_SA

    def shape(self, row: PackedRow) -> torch.Size:
        return torch.Size((row.num_segments, self.net.config.num_reward_attributes))


Scorer = LogprobScorer | AttributeScorer


def heads(scorer: Scorer) -> list[nn.Module]:
    """What is float32 whatever the decoder computes in."""
    return [module for name, module in scorer.net.named_children() if name == "reward_head"]


def hidden(net: Transformer | RewardModel, x: Tensor, row: PackedRow) -> Tensor:
    """The decoder on a packed row: from token ids (N,), or what an earlier part made of them, to (N, D)."""
    hidden_ND: Tensor = net.model(x, row.positions_N, PackedAttend(row.runs))
    return hidden_ND


def segment_logprobs(logprobs_P: Tensor, row: PackedRow) -> Tensor:
    """Sum of the trained tokens' log-probabilities of each segment, (S,)."""
    return logprobs_P.new_zeros(row.num_segments).index_add(0, row.segment_P, logprobs_P)


def trained_counts(row: PackedRow) -> Tensor:
    """Trained tokens of each segment, (S,)."""
    return torch.bincount(row.segment_P, minlength=row.num_segments)


# ---- policy gradients


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


class ValueScorer(AttributeScorer):
    """The critic's value before each token of the answers, (P,), float32."""

    def read(self, hidden_ND: Tensor, row: PackedRow) -> Tensor:
        values_P1: Tensor = self.net(hidden_ND[row.predict_P])
        return values_P1[:, 0].clone()  # FSDP2 must not be handed a view

    def shape(self, row: PackedRow) -> torch.Size:
        return row.target_P.shape


# ---- Activation checkpointing: a block keeps its input alone and computes the rest again for the gradient.


class CheckpointedBlock(Block):
    """A block with the parts, and so the weights and their names, of the one it replaces."""

    def __init__(self, base: Block) -> None:
        nn.Module.__init__(self)
        for name, part in base.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        # Random numbers of dropout are drawn again as they were (preserve_rng_state).
        out: Tensor = checkpoint(super().forward, x, rotation, attend, use_reentrant=False)
        return out


def checkpoint_activations(decoder: Decoder) -> None:
    """Replace every block of the decoder, in place."""
    for layer, block in enumerate(decoder.blocks()):
        decoder.layers[layer] = CheckpointedBlock(block)
