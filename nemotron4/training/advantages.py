"""From rewards to advantages: plain numbers of one step's answers in, numbers for the losses out.

Legend: B answers, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron4.training import losses

Row = tuple[float, ...]


def group_advantages(rewards: Sequence[float], *, is_normalised: bool) -> list[float] | None:
    """The advantage of each answer to one prompt; None if a single answer is left and nothing to compare.

    ``is_normalised``: (reward - mean) / (standard deviation + 1e-4), GRPO; else the reward minus the mean
    of the others, REINFORCE leave-one-out.
    """
    if len(rewards) < 2:
        return None
    rewards_GK = torch.tensor([list(rewards)], dtype=torch.float64)
    compute = losses.group_advantages if is_normalised else losses.leave_one_out_advantages
    advantages: list[float] = compute(rewards_GK)[0].tolist()
    # Equal rewards may differ from their mean by a rounding error, which the division would magnify.
    return [0.0] * len(rewards) if len(set(rewards)) == 1 else advantages


def token_kl(logprobs: Row, reference: Row, *, is_absolute: bool) -> Row:
    """log policy - log reference of each token, or its absolute value (NeMo-Aligner's use_absolute_kl)."""
    differences = (p - q for p, q in zip(logprobs, reference, strict=True))
    return tuple(abs(d) if is_absolute else d for d in differences)


def actor_critic_advantages(
    rewards: Sequence[Row], values: Sequence[Row], *, discount: float, decay: float, is_normalised: bool
) -> tuple[list[Row], list[Row]]:
    """Advantages and returns of each token by generalised advantage estimation.

    ``is_normalised``: the advantages of all tokens together get mean 0 and variance 1 (uncorrected, with
    1e-8 under the root, NeMo-Aligner).
    """
    mask_BT = _padded([[1.0] * len(row) for row in rewards]).bool()
    found = losses.gae(_padded(rewards), _padded(values), mask_BT, discount=discount, decay=decay)
    advantages_BT = found.advantages
    if is_normalised:
        known = advantages_BT[mask_BT]
        advantages_BT = (advantages_BT - known.mean()) * torch.rsqrt(known.var(correction=0) + 1e-8)
    lengths = [len(row) for row in rewards]
    return _rows(advantages_BT, lengths), _rows(found.returns, lengths)


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows], dtype=torch.float64)


def _rows(values_BT: Tensor, lengths: Sequence[int]) -> list[Row]:
    return [tuple(row[:length]) for row, length in zip(values_BT.tolist(), lengths, strict=True)]
