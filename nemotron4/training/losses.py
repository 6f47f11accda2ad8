"""Every objective as a pure function of tensors: no model, no configuration, no collective call.

A loss returns (sum, count). The trainer adds counts over micro-batches and processes first and divides
once, so a loss and its gradient do not depend on how a batch was cut.

Legend: B sequences or pairs, T tokens, A reward attributes, G prompts, K answers per prompt.
Log-probabilities are in nats. Everything is computed in the type given, at least float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MISSING_LABEL = -100.0


class SumCount(NamedTuple):
    """A loss before its division: the sum of its terms and how many there are (both scalars)."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


class Advantages(NamedTuple):
    """What generalised advantage estimation returns, both B x T."""

    advantages: Tensor
    returns: Tensor


class KlEstimators(NamedTuple):
    """Per-token estimates of KL(policy || reference) from the policy's own samples (Schulman 2020)."""

    k1: Tensor
    k2: Tensor
    k3: Tensor


class WeightedAnswers(NamedTuple):
    """SteerLM 2.0's loss, its distance KL(w || b), and 1 / sum w^2: how many answers they amount to."""

    loss: SumCount
    distance_G: Tensor
    effective_G: Tensor


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _total(terms: Tensor) -> SumCount:
    terms = _wide(terms)
    return SumCount(terms.sum(), torch.tensor(terms.numel(), dtype=terms.dtype, device=terms.device))


def _masked_total(terms: Tensor, mask: Tensor) -> SumCount:
    # where, not a product: an infinite value under the mask must not become nan.
    terms = _wide(terms)
    kept = torch.where(mask.bool(), terms, torch.zeros_like(terms))
    return SumCount(kept.sum(), mask.bool().sum().to(terms.dtype))


def sft(logprobs_BT: Tensor, mask_BT: Tensor) -> SumCount:
    """Negative log-likelihood of the trained tokens; count = trained tokens."""
    return _masked_total(-logprobs_BT, mask_BT)


def dpo(policy_margin_B: Tensor, reference_margin_B: Tensor, *, beta: float) -> SumCount:
    """-log sigmoid(beta * (policy - reference)) (Rafailov et al. 2023, eq. 7); count = pairs.

    A margin is log p(chosen) - log p(rejected).
    """
    return _total(-logsigmoid(beta * _wide(policy_margin_B - reference_margin_B)))


def ipo(policy_margin_B: Tensor, reference_margin_B: Tensor, *, beta: float) -> SumCount:
    """(delta - 1 / (2 beta))^2 with delta = policy - reference margin (Azar et al. 2023, eq. 17)."""
    return _total((_wide(policy_margin_B - reference_margin_B) - 1 / (2 * beta)) ** 2)


def rpo(
    policy_margin_B: Tensor,
    reference_margin_B: Tensor,
    reward_margin_B: Tensor,
    *,
    beta: float,
    eta: float,
    distance: Literal["bwd_kl", "fwd_kl", "sq"] = "bwd_kl",
) -> SumCount:
    """Reward-aware Preference Optimization (arXiv 2406.11704, section 3.3); count = pairs.

    With a = beta * (policy - reference margin) and b = eta * reward margin:

        bwd_kl   KL(Bernoulli(sigmoid b) || Bernoulli(sigmoid a)), as in the report;
                 its derivative by a is sigmoid a - sigmoid b
        fwd_kl   the same with the sides exchanged
        sq       (a - b)^2

    The names are NeMo-Aligner's. Zero exactly where a equals b.
    """
    a = beta * _wide(policy_margin_B - reference_margin_B)
    b = eta * _wide(reward_margin_B).to(a.dtype)
    if distance == "sq":
        return _total((a - b) ** 2)
    model, target = (a, b) if distance == "bwd_kl" else (b, a)
    return _total(_bernoulli_kl(target, model))


def _bernoulli_kl(p_logit: Tensor, q_logit: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid p) || Bernoulli(sigmoid q)) without ever taking the log of a sigmoid."""
    yes = torch.sigmoid(p_logit) * (logsigmoid(p_logit) - logsigmoid(q_logit))
    no = torch.sigmoid(-p_logit) * (logsigmoid(-p_logit) - logsigmoid(-q_logit))
    return yes + no


def kto(
    policy_logprob_B: Tensor,
    reference_logprob_B: Tensor,
    is_desirable_B: Tensor,
    *,
    kl_baseline: Tensor | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> SumCount:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024); count = answers.

    ``kl_baseline`` is z0 = max(0, mean log-ratio over mismatched prompts and answers of the whole batch);
    it is an argument because it belongs to the batch, not to a micro-batch.
    """
    ratio_B = _wide(policy_logprob_B - reference_logprob_B)
    baseline = kl_baseline.detach() if isinstance(kl_baseline, Tensor) else kl_baseline
    is_desirable_B = is_desirable_B.bool()
    sign_B = torch.where(is_desirable_B, 1.0, -1.0).to(ratio_B.dtype)
    weight_B = torch.where(is_desirable_B, desirable_weight, undesirable_weight).to(ratio_B.dtype)
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its precision for large x.
    return _total(weight_B * torch.sigmoid(-beta * sign_B * (ratio_B - baseline)))


def reward_regression(prediction_BA: Tensor, label_BA: Tensor) -> SumCount:
    """Squared error over the labelled cells; a label of -100 is missing; count = labelled cells."""
    is_labelled_BA = label_BA != MISSING_LABEL
    return _masked_total((_wide(prediction_BA) - label_BA) ** 2, is_labelled_BA)


def bradley_terry(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    strength_B: Tensor | None = None,
    variant: Literal["regular", "margin", "scaled"] = "regular",
) -> SumCount:
    """-log sigmoid(chosen - rejected) of two scores; count = pairs.

    ``strength_B`` >= 0 says by how much the chosen answer was preferred (HelpSteer2-Preference, 0 to 3):
    ``margin`` subtracts it from the difference, ``scaled`` multiplies the loss by it.
    """
    difference_B = _wide(chosen_B - rejected_B)
    if variant == "regular":
        return _total(-logsigmoid(difference_B))
    if strength_B is None:
        raise ValueError(f"variant {variant!r} needs strength_B")
    if variant == "margin":
        return _total(-logsigmoid(difference_B - strength_B))
    return _total(strength_B * -logsigmoid(difference_B))


def steerlm_weighted(
    logprobs_GK: Tensor, *, target_GK: Tensor, proposal_GK: Tensor, mean_length_G: Tensor
) -> WeightedAnswers:
    """SteerLM 2.0 (NeMo-Aligner) on K answers drawn from Q' for each prompt; count = prompts.

        w = softmax(log P(a|x,y) + log P(y|x) - log Q'(y|a,x))     ``target_GK`` is the first two together
        b = softmax(log Q(y|a,x) - log Q'(y|a,x))                  ``proposal_GK`` is log Q'

    The loss is KL(w || b) / mean answer length; its derivative by log Q is (b - w) / mean answer length.
    """
    policy_GK, proposal_GK = _wide(logprobs_GK), _wide(proposal_GK)
    log_w_GK = torch.log_softmax(_wide(target_GK) - proposal_GK, dim=1)
    log_b_GK = torch.log_softmax(policy_GK - proposal_GK, dim=1)
    w_GK = log_w_GK.exp()
    # An answer without weight has log w = -inf at most: 0 times it is 0.
    distance_G = torch.where(w_GK > 0, w_GK * (log_w_GK - log_b_GK), 0.0).sum(dim=1)
    return WeightedAnswers(_total(distance_G / mean_length_G), distance_G, 1 / w_GK.square().sum(dim=1))


def ppo_actor(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> SumCount:
    """Clipped surrogate max(-A rho, -A clip(rho)) (Schulman et al. 2017, eq. 7); count = unmasked tokens."""
    return _masked_total(
        _clipped_surrogate(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip_low, clip_high), mask_BT
    )


def _clipped_surrogate(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    difference_BT = _wide(logprobs_BT - old_logprobs_BT)
    # The exponential of a masked position could overflow and turn its zero gradient into nan.
    ratio_BT = torch.where(mask_BT.bool(), difference_BT, torch.zeros_like(difference_BT)).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)


def ppo_critic(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, *, clip: float = 0.2
) -> SumCount:
    """Half the larger of the plain and the clipped squared error; count = unmasked tokens."""
    values_BT, old_values_BT = _wide(values_BT), _wide(old_values_BT)
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    errors_BT = torch.maximum((values_BT - returns_BT) ** 2, (clipped_BT - returns_BT) ** 2)
    return _masked_total(0.5 * errors_BT, mask_BT)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, discount: float = 1.0, decay: float = 0.95
) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2015); the value after the last token is 0.

    ``mask_BT`` marks the tokens of the answer, one contiguous run per row; the rest gets 0.
    """
    mask_BT = mask_BT.bool()
    values_BT = torch.where(mask_BT, _wide(values_BT), 0.0)
    rewards_BT = torch.where(mask_BT, _wide(rewards_BT), 0.0)
    advantages_BT = torch.zeros_like(values_BT)
    carry_B = torch.zeros_like(values_BT[:, 0])
    next_value_B = torch.zeros_like(carry_B)
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + discount * next_value_B - values_BT[:, t]
        carry_B = torch.where(mask_BT[:, t], delta_B + discount * decay * carry_B, 0.0)
        advantages_BT[:, t] = carry_B
        next_value_B = values_BT[:, t]
    return Advantages(advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0.0))


def reinforce(logprobs_BT: Tensor, advantage_B: Tensor, mask_BT: Tensor) -> SumCount:
    """-log p * (reward - baseline) over the answer's tokens; count = unmasked tokens (NeMo-Aligner)."""
    return _masked_total(-_wide(logprobs_BT) * advantage_B[:, None], mask_BT)


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


def grpo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    *,
    reference_logprobs_BT: Tensor | None = None,
    kl_coefficient: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> SumCount:
    """PPO's clipped surrogate with one advantage per answer, plus k3 KL to the reference; count = tokens."""
    advantages_BT = advantage_B[:, None].expand_as(logprobs_BT)
    terms_BT = _clipped_surrogate(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip_low, clip_high)
    if kl_coefficient:
        if reference_logprobs_BT is None:
            raise ValueError(f"kl_coefficient {kl_coefficient} needs reference_logprobs_BT")
        keep = mask_BT.bool()
        policy_BT = torch.where(keep, logprobs_BT, 0.0)
        reference_BT = torch.where(keep, reference_logprobs_BT, 0.0)
        terms_BT = terms_BT + kl_coefficient * kl_estimators(policy_BT, reference_BT).k3
    return _masked_total(terms_BT, mask_BT)


def kl_estimators(logprobs: Tensor, reference_logprobs: Tensor) -> KlEstimators:
    """k1 = -r, k2 = r^2 / 2, k3 = e^r - 1 - r with r = log reference - log policy, of any shape.

    k1 is unbiased and may be negative; k2 is biased and low in variance; k3 is unbiased and never negative.
    """
    log_ratio = _wide(reference_logprobs - logprobs)
    return KlEstimators(-log_ratio, log_ratio**2 / 2, torch.expm1(log_ratio) - log_ratio)


# ---- from rewards to advantages: plain numbers of one step's answers in, numbers for the losses out

Row = tuple[float, ...]


def advantages_of_group(rewards: Sequence[float], *, is_normalised: bool) -> list[float] | None:
    """The advantage of each answer to one prompt; None if a single answer is left and nothing to compare.

    ``is_normalised``: (reward - mean) / (standard deviation + 1e-4), GRPO; else the reward minus the mean
    of the others, REINFORCE leave-one-out.
    """
    if len(rewards) < 2:
        return None
    rewards_GK = torch.tensor([list(rewards)], dtype=torch.float64)
    compute = group_advantages if is_normalised else leave_one_out_advantages
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
