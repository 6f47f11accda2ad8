"""From rewards to advantages: what an answer, or a token of it, is better than expected.

Legend: B sequences, T tokens, G prompts, K answers per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron4.training.rollout_settings import AdvantageKind

Row = tuple[float, ...]


class Advantages(NamedTuple):
    """What generalised advantage estimation returns, both B x T."""

    advantages: Tensor
    returns: Tensor


def leave_one_out_advantages(rewards_GK: Tensor) -> Tensor:
    """Reward minus the mean reward of the other answers to the same prompt (G x K); K >= 2."""
    num_answers = rewards_GK.shape[1]
    if num_answers < 2:
        raise ValueError(f"{num_answers} answer per prompt; a leave-one-out baseline needs 2 or more")
    others_GK = (rewards_GK.sum(dim=1, keepdim=True) - rewards_GK) / (num_answers - 1)
    return rewards_GK - others_GK


def group_advantages(rewards_GK: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """(reward - group mean) / (group standard deviation + epsilon), Bessel-corrected (DeepSeekMath 2024).

    0 for a group whose rewards are all equal: it says nothing about which answer was better.
    """
    centred_GK = rewards_GK - rewards_GK.mean(dim=1, keepdim=True)
    if rewards_GK.shape[1] < 2:
        raise ValueError(f"{rewards_GK.shape[1]} answer per prompt; group advantages need 2 or more")
    return centred_GK / (rewards_GK.std(dim=1, keepdim=True) + epsilon)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, discount: float = 1.0, decay: float = 0.95
) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2015); the value after the last token is 0.

    ``mask_BT`` marks the tokens of the answer, one contiguous run per row; the rest gets 0.
    """
    mask_BT = mask_BT.bool()
    values_BT = torch.where(mask_BT, values_BT, 0.0)
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    advantages_BT = torch.zeros_like(values_BT)
    carry_B = torch.zeros_like(values_BT[:, 0])
    next_value_B = torch.zeros_like(carry_B)
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + discount * next_value_B - values_BT[:, t]
        carry_B = torch.where(mask_BT[:, t], delta_B + discount * decay * carry_B, 0.0)
        advantages_BT[:, t] = carry_B
        next_value_B = values_BT[:, t]
    return Advantages(advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0.0))


# ---- plain numbers of one step's answers in, numbers for the losses out


def advantages_of_group(rewards: Sequence[float], kind: AdvantageKind) -> list[float] | None:
    """The advantage of each answer to one prompt; None if a single answer is left and nothing to compare.

    group          (reward - mean) / (standard deviation + 1e-4): GRPO
    centred        reward - mean: Dr. GRPO; REINFORCE++-baseline, which then takes ``normalised``
    leave_one_out  reward - mean of the others: RLOO, NeMo-Aligner's REINFORCE
    """
    if len(rewards) < 2:
        return None
    if len(set(rewards)) == 1:  # their mean may differ by a rounding error, which a division would magnify
        return [0.0] * len(rewards)
    rewards_GK = torch.tensor([list(rewards)], dtype=torch.float64)
    if kind == "centred" or kind == "batch":
        return [reward - float(rewards_GK.mean()) for reward in rewards]
    compute = group_advantages if kind == "group" else leave_one_out_advantages
    advantages: list[float] = compute(rewards_GK)[0].tolist()
    return advantages


def normalised(advantages: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Mean 0 and variance 1 over all tokens of the step, each of which has its answer's advantage.

    REINFORCE++-baseline (Hu 2025): A = (A' - mean A') / std A' with A' the reward less its group's mean.
    """
    values = torch.tensor(advantages, dtype=torch.float64)
    counts = torch.tensor(lengths, dtype=torch.float64)
    mean = (values * counts).sum() / counts.sum()
    variance = ((values - mean).square() * counts).sum() / counts.sum()
    found: list[float] = ((values - mean) * torch.rsqrt(variance + 1e-8)).tolist()
    return found


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
    found = gae(_padded(rewards), _padded(values), mask_BT, discount=discount, decay=decay)
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
