"""Every objective as a pure function of tensors: no model, no configuration, no collective call.

A loss returns (sum, count). The trainer adds counts over micro-batches and processes first and divides
once, so a loss and its gradient do not depend on how a batch was cut.

Legend: B sequences or pairs, T tokens, A reward attributes, G prompts, K answers per prompt.
Log-probabilities are in nats. Everything is computed in the type given, at least float32.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemotron4.training.rollout_settings import LossOver, Ratio
from nemotron4.training.rows import MISSING


class SumCount(NamedTuple):
    """A loss before its division: the sum of its terms and how many there are (both scalars)."""

    sum: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here


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


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _total(terms: Tensor) -> SumCount:
    terms = wide(terms)
    return SumCount(terms.sum(), torch.tensor(terms.numel(), dtype=terms.dtype, device=terms.device))


def _masked_total(terms: Tensor, mask: Tensor) -> SumCount:
    # where, not a product: an infinite value under the mask must not become nan.
    terms = wide(terms)
    kept = torch.where(mask.bool(), terms, torch.zeros_like(terms))
    return SumCount(kept.sum(), mask.bool().sum().to(terms.dtype))


def sft(logprobs_BT: Tensor, mask_BT: Tensor) -> SumCount:
    """Negative log-likelihood of the trained tokens; count = trained tokens."""
    return _masked_total(-logprobs_BT, mask_BT)


def dpo(policy_margin_B: Tensor, reference_margin_B: Tensor, *, beta: float) -> SumCount:
    """-log sigmoid(beta * (policy - reference)) (Rafailov et al. 2023, eq. 7); count = pairs.

    A margin is log p(chosen) - log p(rejected).
    """
    return _total(-logsigmoid(beta * wide(policy_margin_B - reference_margin_B)))


def ipo(policy_margin_B: Tensor, reference_margin_B: Tensor, *, beta: float) -> SumCount:
    """(delta - 1 / (2 beta))^2 with delta = policy - reference margin (Azar et al. 2023, eq. 17)."""
    return _total((wide(policy_margin_B - reference_margin_B) - 1 / (2 * beta)) ** 2)


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
    a = beta * wide(policy_margin_B - reference_margin_B)
    b = eta * wide(reward_margin_B).to(a.dtype)
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
    ratio_B = wide(policy_logprob_B - reference_logprob_B)
    baseline = kl_baseline.detach() if isinstance(kl_baseline, Tensor) else kl_baseline
    is_desirable_B = is_desirable_B.bool()
    sign_B = torch.where(is_desirable_B, 1.0, -1.0).to(ratio_B.dtype)
    weight_B = torch.where(is_desirable_B, desirable_weight, undesirable_weight).to(ratio_B.dtype)
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its precision for large x.
    return _total(weight_B * torch.sigmoid(-beta * sign_B * (ratio_B - baseline)))


def reward_regression(prediction_BA: Tensor, label_BA: Tensor) -> SumCount:
    """Squared error over the labelled cells; a label of -100 is missing; count = labelled cells."""
    is_labelled_BA = label_BA != MISSING
    return _masked_total((wide(prediction_BA) - label_BA) ** 2, is_labelled_BA)


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
    difference_B = wide(chosen_B - rejected_B)
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
    policy_GK, proposal_GK = wide(logprobs_GK), wide(proposal_GK)
    log_w_GK = torch.log_softmax(wide(target_GK) - proposal_GK, dim=1)
    log_b_GK = torch.log_softmax(policy_GK - proposal_GK, dim=1)
    w_GK = log_w_GK.exp()
    # An answer without weight has log w = -inf at most: 0 times it is 0.
    distance_G = torch.where(w_GK > 0, w_GK * (log_w_GK - log_b_GK), 0.0).sum(dim=1)
    return WeightedAnswers(_total(distance_G / mean_length_G), distance_G, 1 / w_GK.square().sum(dim=1))


def policy_ratio(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor, *, per: Ratio = "token"
) -> Tensor:
    """policy / old policy of each token, B x T; per sequence it is the geometric mean over the answer.

    The latter is GSPO's s_i (Zheng et al. 2025, eq. 7), repeated over the tokens of answer i.
    """
    # The exponential of a masked position could overflow and turn its zero gradient into nan.
    log_BT = torch.where(mask_BT.bool(), wide(logprobs_BT - old_logprobs_BT), 0.0)
    if per == "sequence":
        log_BT = (log_BT.sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1))[:, None].expand_as(log_BT)
    return log_BT.exp()


def _per_token(advantages: Tensor) -> Tensor:
    """One advantage for each answer (B,) or each token (B, T), as a factor of tokens."""
    return advantages if advantages.dim() == 2 else advantages[:, None]


def averaged(terms_BT: Tensor, mask_BT: Tensor, over: LossOver) -> SumCount:
    """One number of a step's terms: their mean over tokens, the mean over answers of each one's mean, or of
    each one's sum.
    """
    if over == "tokens":
        return _masked_total(terms_BT, mask_BT)
    sums_B = torch.where(mask_BT.bool(), wide(terms_BT), 0.0).sum(dim=1)
    return _total(sums_B if over == "sums" else sums_B / mask_BT.sum(dim=1).clamp(min=1))


def ppo_actor(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: Ratio = "token",
    loss_over: LossOver = "tokens",
    weights_BT: Tensor | None = None,
    kl_BT: Tensor | None = None,
) -> SumCount:
    """Clipped surrogate max(-A rho, -A clip(rho)) (Schulman et al. 2017, eq. 7); count = unmasked tokens.

    ``weights_BT`` multiply it, ``kl_BT`` is added to it. ``loss_over``: see ``averaged``.
    """
    ratio_BT = policy_ratio(logprobs_BT, old_logprobs_BT, mask_BT, per=ratio)
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    terms_BT = torch.maximum(-advantages_BT * ratio_BT, -advantages_BT * clipped_BT)
    terms_BT = terms_BT if weights_BT is None else terms_BT * weights_BT
    return averaged(terms_BT if kl_BT is None else terms_BT + kl_BT, mask_BT, loss_over)


def ppo_critic(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, *, clip: float = 0.2
) -> SumCount:
    """Half the larger of the plain and the clipped squared error; count = unmasked tokens."""
    values_BT, old_values_BT = wide(values_BT), wide(old_values_BT)
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    errors_BT = torch.maximum((values_BT - returns_BT) ** 2, (clipped_BT - returns_BT) ** 2)
    return _masked_total(0.5 * errors_BT, mask_BT)


def reinforce(
    logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    loss_over: LossOver = "tokens",
    weights_BT: Tensor | None = None,
) -> SumCount:
    """-log p * (reward - baseline) over the answer's tokens; count = unmasked tokens (NeMo-Aligner).

    With ``loss_over`` sums it is -log p(answer) * (reward - baseline), a mean over answers: RLOO.
    """
    terms_BT = -wide(logprobs_BT) * _per_token(advantages)
    return averaged(terms_BT if weights_BT is None else terms_BT * weights_BT, mask_BT, loss_over)


def grpo(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    reference_logprobs_BT: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: Literal["k2", "k3"] = "k3",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio: Ratio = "token",
    loss_over: LossOver = "tokens",
    weights_BT: Tensor | None = None,
) -> SumCount:
    """PPO's clipped surrogate with one advantage per answer, plus a KL to the reference; count = tokens."""
    kl_BT = None
    if kl_coefficient:
        if reference_logprobs_BT is None:
            raise ValueError(f"kl_coefficient {kl_coefficient} needs reference_logprobs_BT")
        keep = mask_BT.bool()
        policy_BT = torch.where(keep, logprobs_BT, 0.0)
        found = kl_estimators(policy_BT, torch.where(keep, reference_logprobs_BT, 0.0))
        kl_BT = kl_coefficient * (found.k2 if kl_estimator == "k2" else found.k3)
    return ppo_actor(
        logprobs_BT,
        old_logprobs_BT,
        _per_token(advantages).expand_as(logprobs_BT),
        mask_BT,
        clip_low=clip_low,
        clip_high=clip_high,
        ratio=ratio,
        loss_over=loss_over,
        weights_BT=weights_BT,
        kl_BT=kl_BT,
    )


def kl_estimators(logprobs: Tensor, reference_logprobs: Tensor) -> KlEstimators:
    """k1 = -r, k2 = r^2 / 2, k3 = e^r - 1 - r with r = log reference - log policy, of any shape.

    k1 is unbiased and may be negative; k2 is biased and low in variance; k3 is unbiased and never negative.
    """
    log_ratio = wide(reference_logprobs - logprobs)
    return KlEstimators(-log_ratio, log_ratio**2 / 2, torch.expm1(log_ratio) - log_ratio)
