"""The losses against closed forms, float64 references written in plain Python, and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron4.training import losses
from nemotron4.training.advantages import (
    advantages_of_group,
    gae,
    group_advantages,
    leave_one_out_advantages,
    normalised,
)

EXTREMES = torch.tensor([-1000.0, -104.0, -30.0, -1.0, 0.0, 1.0, 30.0, 104.0, 1000.0])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def bernoulli_kl(p_logit: float, q_logit: float) -> float:
    return sigmoid(p_logit) * (log_sigmoid(p_logit) - log_sigmoid(q_logit)) + sigmoid(-p_logit) * (
        log_sigmoid(-p_logit) - log_sigmoid(-q_logit)
    )


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def mean(loss: losses.SumCount) -> Tensor:
    return loss.sum / loss.count


def derivative(loss: Callable[[Tensor], losses.SumCount], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    loss(at).sum.backward()
    assert at.grad is not None
    return at.grad


# ---- supervised


def test_sft_sums_the_trained_tokens_and_counts_them() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
    loss = losses.sft(logprobs, torch.tensor([[0, 1, 1], [0, 0, 1]]))
    assert (float(loss.sum), float(loss.count)) == (38.0, 3.0)


def test_sft_ignores_an_infinite_value_under_the_mask() -> None:
    logprobs = torch.tensor([[-1.0, -math.inf]], requires_grad=True)
    losses.sft(logprobs, torch.tensor([[1, 0]])).sum.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


def test_bfloat16_terms_are_summed_in_float32() -> None:
    loss = losses.sft(-torch.ones(1, 1000, dtype=torch.bfloat16), torch.ones(1, 1000))
    assert loss.sum.dtype == torch.float32
    assert float(loss.sum) == 1000.0


# ---- preference


def test_dpo_is_log_two_at_equal_margins() -> None:
    margin = random(4)
    assert float(mean(losses.dpo(margin, margin, beta=0.3))) == pytest.approx(math.log(2), abs=1e-15)


def test_dpo_gradient_is_beta_times_sigmoid_minus_one() -> None:
    policy, reference = random(6, seed=1), random(6, seed=2)
    expected = 0.3 * (torch.sigmoid(0.3 * (policy - reference)) - 1)
    actual = derivative(lambda x: losses.dpo(x, reference, beta=0.3), policy)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_ipo_is_zero_at_its_target_margin() -> None:
    reference = random(4)
    assert float(losses.ipo(reference + 1 / (2 * 0.25), reference, beta=0.25).sum) == pytest.approx(
        0, abs=1e-28
    )


@pytest.mark.parametrize("distance", ["bwd_kl", "fwd_kl", "sq"])
def test_rpo_is_exactly_zero_at_equal_margins(distance: str) -> None:
    delta = torch.tensor([-1000.0, -3.0, 0.0, 0.7, 1000.0])
    loss = losses.rpo(delta, torch.zeros(5), delta, beta=0.5, eta=0.5, distance=distance)
    assert float(loss.sum) == 0.0
    gradient = derivative(
        lambda x: losses.rpo(x, torch.zeros(5), delta, beta=0.5, eta=0.5, distance=distance), delta
    )
    assert float(gradient.abs().max()) < 1e-7


def test_rpo_backward_gradient_is_the_difference_of_the_sigmoids() -> None:
    policy, reference, reward = random(9, seed=1), random(9, seed=2), random(9, seed=3, scale=2)
    beta, eta = 0.4, 1.3
    actual = derivative(lambda x: losses.rpo(x, reference, reward, beta=beta, eta=eta), policy)
    expected = beta * (torch.sigmoid(beta * (policy - reference)) - torch.sigmoid(eta * reward))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


def test_rpo_forward_gradient_follows_its_closed_form() -> None:
    policy, reference, reward = random(9, seed=1), random(9, seed=2), random(9, seed=3)
    a, b = 0.4 * (policy - reference), 1.3 * reward
    actual = derivative(
        lambda x: losses.rpo(x, reference, reward, beta=0.4, eta=1.3, distance="fwd_kl"), policy
    )
    q = torch.sigmoid(a)
    torch.testing.assert_close(actual, 0.4 * q * (1 - q) * (a - b), rtol=1e-10, atol=1e-14)


def test_rpo_tends_to_dpo_as_the_reward_margin_grows() -> None:
    policy, reference = random(6, seed=1, scale=3), random(6, seed=2, scale=3)
    rpo = losses.rpo(policy, reference, torch.full((6,), 60.0, dtype=torch.float64), beta=0.5, eta=1.0)
    torch.testing.assert_close(rpo.sum, losses.dpo(policy, reference, beta=0.5).sum, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("distance", "swap"), [("bwd_kl", False), ("fwd_kl", True)])
@given(a=st.floats(-60, 60), b=st.floats(-60, 60))
@settings(max_examples=60, deadline=None)
def test_rpo_equals_a_kl_written_in_plain_python(distance: str, swap: bool, a: float, b: float) -> None:
    as_tensor = torch.tensor([a], dtype=torch.float64)
    loss = losses.rpo(
        as_tensor,
        torch.zeros_like(as_tensor),
        torch.tensor([b], dtype=torch.float64),
        beta=1.0,
        eta=1.0,
        distance=distance,
    )
    expected = bernoulli_kl(a, b) if swap else bernoulli_kl(b, a)
    assert float(loss.sum) == pytest.approx(expected, rel=1e-11, abs=1e-13)


PAIR_LOSSES: dict[str, Callable[[Tensor], losses.SumCount]] = {
    "dpo": lambda x: losses.dpo(x, torch.zeros_like(x), beta=1.0),
    "ipo": lambda x: losses.ipo(x, torch.zeros_like(x), beta=1.0),
    "rpo_bwd": lambda x: losses.rpo(x, torch.zeros_like(x), -x.detach(), beta=1.0, eta=1.0),
    "rpo_fwd": lambda x: losses.rpo(
        x, torch.zeros_like(x), -x.detach(), beta=1.0, eta=1.0, distance="fwd_kl"
    ),
    "rpo_sq": lambda x: losses.rpo(x, torch.zeros_like(x), -x.detach(), beta=1.0, eta=1.0, distance="sq"),
    "kto_good": lambda x: losses.kto(x, torch.zeros_like(x), torch.ones_like(x), kl_baseline=0.5, beta=1.0),
    "kto_bad": lambda x: losses.kto(x, torch.zeros_like(x), torch.zeros_like(x), kl_baseline=0.5, beta=1.0),
    "bradley_terry": lambda x: losses.bradley_terry(x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_float32_equals_float64_at_margins_up_to_a_thousand(name: str) -> None:
    loss = PAIR_LOSSES[name]
    for value in EXTREMES:
        single, double = value[None], value[None].double()
        torch.testing.assert_close(loss(single).sum.double(), loss(double).sum, rtol=2e-6, atol=1e-30)
        slope = derivative(loss, single)
        assert slope.isfinite().all()
        torch.testing.assert_close(slope.double(), derivative(loss, double), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    if name.startswith("rpo"):
        distance = {"rpo_bwd": "bwd_kl", "rpo_fwd": "fwd_kl", "rpo_sq": "sq"}[name]
        reward = random(5, seed=9)

        def loss(x: Tensor) -> losses.SumCount:
            return losses.rpo(x, torch.zeros_like(x), reward, beta=0.7, eta=1.1, distance=distance)
    else:
        loss = PAIR_LOSSES[name]
    assert torch.autograd.gradcheck(lambda x: loss(x).sum, (random(5, seed=4).requires_grad_(),))


def test_kto_equals_its_definition() -> None:
    policy, reference = random(4, seed=1), random(4, seed=2)
    loss = losses.kto(
        policy,
        reference,
        torch.tensor([1, 0, 1, 0]),
        kl_baseline=0.3,
        beta=0.5,
        desirable_weight=2.0,
        undesirable_weight=3.0,
    )
    ratio = (policy - reference).tolist()
    expected = sum(
        2.0 * (1 - sigmoid(0.5 * (h - 0.3))) if good else 3.0 * (1 - sigmoid(0.5 * (0.3 - h)))
        for h, good in zip(ratio, [1, 0, 1, 0], strict=True)
    )
    assert float(loss.sum) == pytest.approx(expected, rel=1e-12)
    assert float(loss.count) == 4


def test_kto_baseline_carries_no_gradient() -> None:
    baseline = torch.tensor(0.3, requires_grad=True)
    policy = random(3).requires_grad_()
    losses.kto(policy, torch.zeros_like(policy), torch.ones(3), kl_baseline=baseline, beta=0.5).sum.backward()
    assert baseline.grad is None


# ---- reward models


def test_reward_regression_counts_labelled_cells_only() -> None:
    prediction = torch.tensor([[1.0, 5.0], [2.0, 3.0]], requires_grad=True)
    loss = losses.reward_regression(prediction, torch.tensor([[0.0, -100.0], [4.0, 3.0]]))
    assert (float(loss.sum.detach()), float(loss.count)) == (5.0, 3.0)
    loss.sum.backward()
    assert prediction.grad is not None
    assert prediction.grad.tolist() == [[2.0, 0.0], [-4.0, 0.0]]


def test_regression_without_a_labelled_cell_counts_zero() -> None:
    loss = losses.reward_regression(torch.ones(2, 2), torch.full((2, 2), -100.0))
    assert (float(loss.sum), float(loss.count)) == (0.0, 0.0)


@pytest.mark.parametrize("variant", ["regular", "margin", "scaled"])
def test_bradley_terry_variants_equal_their_definitions(variant: str) -> None:
    chosen, rejected, strength = random(5, seed=1), random(5, seed=2), torch.tensor([0.0, 1, 2, 3, 1])
    loss = losses.bradley_terry(chosen, rejected, strength_B=strength.double(), variant=variant)
    expected = 0.0
    for d, s in zip((chosen - rejected).tolist(), strength.tolist(), strict=True):
        expected += {
            "regular": -log_sigmoid(d),
            "margin": -log_sigmoid(d - s),
            "scaled": -s * log_sigmoid(d),
        }[variant]
    assert float(loss.sum) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variant", ["margin", "scaled"])
def test_bradley_terry_variants_need_a_strength(variant: str) -> None:
    with pytest.raises(ValueError, match="strength_B"):
        losses.bradley_terry(torch.ones(2), torch.zeros(2), variant=variant)


# ---- policy gradient


def plain_gae(rewards: list[float], values: list[float], discount: float, decay: float) -> list[float]:
    """The definition: sum over l of (discount * decay)^l times the error at t + l."""
    padded = [*values, 0.0]
    errors = [r + discount * padded[t + 1] - padded[t] for t, r in enumerate(rewards)]
    return [
        sum((discount * decay) ** (u - t) * errors[u] for u in range(t, len(errors)))
        for t in range(len(errors))
    ]


def test_gae_equals_its_definition_on_the_answer_and_is_zero_elsewhere() -> None:
    rewards, values = random(2, 6, seed=1), random(2, 6, seed=2)
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])
    result = gae(rewards, values, mask, discount=0.9, decay=0.8)
    for row in range(2):
        answer = mask[row].bool()
        expected = plain_gae(rewards[row][answer].tolist(), values[row][answer].tolist(), 0.9, 0.8)
        assert result.advantages[row][answer].tolist() == pytest.approx(expected, rel=1e-12)
        assert not result.advantages[row][~answer].any()
        assert not result.returns[row][~answer].any()
    torch.testing.assert_close(result.returns, torch.where(mask.bool(), result.advantages + values, 0.0))


def test_gae_without_decay_and_values_is_the_reward_to_go() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    result = gae(rewards, torch.zeros(1, 3), torch.ones(1, 3), discount=1.0, decay=1.0)
    assert result.advantages.tolist() == [[7.0, 6.0, 4.0]]


def test_ppo_actor_equals_its_definition() -> None:
    new, old, advantage = (
        random(3, 4, seed=1, scale=0.3),
        random(3, 4, seed=2, scale=0.3),
        random(3, 4, seed=3),
    )
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]])
    loss = losses.ppo_actor(new, old, advantage, mask, clip_low=0.1, clip_high=0.3)
    expected = 0.0
    for n, o, a, m in zip(*(x.flatten().tolist() for x in (new, old, advantage, mask)), strict=True):
        ratio = math.exp(n - o)
        expected += m * max(-a * ratio, -a * min(max(ratio, 0.9), 1.3))
    assert float(loss.sum) == pytest.approx(expected, rel=1e-12)
    assert float(loss.count) == 8


def test_ppo_actor_has_no_gradient_beyond_the_clip() -> None:
    slope = derivative(
        lambda x: losses.ppo_actor(x, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)),
        torch.tensor([[1.0, -1.0]]),
    )
    assert slope.tolist() == [[0.0, 0.0]]


def test_a_masked_overflow_leaves_the_gradient_finite() -> None:
    slope = derivative(
        lambda x: losses.ppo_actor(x, torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[1, 0]])),
        torch.tensor([[0.0, 500.0]]),
    )
    assert slope.tolist() == [[-1.0, 0.0]]


def test_ppo_critic_takes_the_larger_error() -> None:
    values, old, returns = torch.tensor([[1.0, 0.1]]), torch.zeros(1, 2), torch.tensor([[2.0, 2.0]])
    loss = losses.ppo_critic(values, old, returns, torch.ones(1, 2), clip=0.2)
    assert float(loss.sum) == pytest.approx(0.5 * (1.8**2 + 1.9**2))


def test_reinforce_weighs_the_answer_by_its_advantage() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    loss = losses.reinforce(logprobs, torch.tensor([2.0, -1.0]), torch.tensor([[1, 1], [0, 1]]))
    assert (float(loss.sum), float(loss.count)) == (2.0 * 3.0 - 4.0, 3.0)


def test_leave_one_out_subtracts_the_mean_of_the_others() -> None:
    advantages = leave_one_out_advantages(torch.tensor([[1.0, 2.0, 6.0]]))
    assert advantages.tolist() == [[-3.0, -1.5, 4.5]]


def test_group_advantages_are_standardised_and_zero_for_equal_rewards() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), epsilon=1e-12)
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="2 or more"):
        group_advantages(torch.ones(3, 1))
    with pytest.raises(ValueError, match="2 or more"):
        leave_one_out_advantages(torch.ones(3, 1))


def test_grpo_is_the_clipped_surrogate_plus_k3() -> None:
    new, old, reference = (random(2, 3, seed=s, scale=0.2) for s in (1, 2, 3))
    advantage, mask = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([[1, 1, 0], [0, 1, 1]])
    loss = losses.grpo(new, old, advantage, mask, reference_logprobs_BT=reference, kl_coefficient=0.5)
    surrogate = losses.ppo_actor(new, old, advantage[:, None].expand(2, 3), mask)
    k3 = (torch.exp(reference - new) - 1 - (reference - new))[mask.bool()].sum()
    assert float(loss.sum) == pytest.approx(float(surrogate.sum + 0.5 * k3), rel=1e-12)
    assert float(loss.count) == 4


# Published methods on three answers of 3, 1 and 2 tokens to one prompt, each written out from its paper.

MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
REWARDS = [1.0, 0.0, 0.25]


def ratios() -> tuple[torch.Tensor, torch.Tensor, list[list[float]]]:
    """New and old log-probabilities, and the ratio of each token of each answer."""
    new, old = (random(3, 3, seed=seed, scale=0.4) for seed in (1, 2))
    found = [[math.exp(new[i, t] - old[i, t]) for t in range(3) if MASK[i, t]] for i in range(3)]
    return new, old, found


def clip(ratio: float, low: float, high: float) -> float:
    return min(max(ratio, 1 - low), 1 + high)


def mean_loss(found: losses.SumCount) -> float:
    return float(found.sum / found.count)


def test_dapo_clips_higher_and_averages_over_tokens() -> None:
    """DAPO (Yu et al. 2025, eq. 8): 1 / sum |o_i| of min(r A, clip(r, 1 - 0.2, 1 + 0.28) A)."""
    new, old, ratio = ratios()
    mean = sum(REWARDS) / 3
    deviation = (sum((r - mean) ** 2 for r in REWARDS) / 2) ** 0.5
    advantage = [(r - mean) / (deviation + 1e-4) for r in REWARDS]
    assert advantages_of_group(REWARDS, "group") == pytest.approx(advantage)
    terms = [min(r * a, clip(r, 0.2, 0.28) * a) for rs, a in zip(ratio, advantage, strict=True) for r in rs]
    found = losses.grpo(new, old, torch.tensor(advantage), MASK, clip_high=0.28)
    assert mean_loss(found) == pytest.approx(-sum(terms) / 6, rel=1e-6)


def test_dr_grpo_divides_neither_by_length_nor_by_deviation() -> None:
    """Dr. GRPO (Liu et al. 2025): 1 / G sum_i sum_t min(r A, clip(r) A), A = R - mean R."""
    new, old, ratio = ratios()
    advantage = [r - sum(REWARDS) / 3 for r in REWARDS]
    assert advantages_of_group(REWARDS, "centred") == pytest.approx(advantage)
    terms = [min(r * a, clip(r, 0.2, 0.2) * a) for rs, a in zip(ratio, advantage, strict=True) for r in rs]
    found = losses.grpo(new, old, torch.tensor(advantage), MASK, loss_over="sums")
    assert mean_loss(found) == pytest.approx(-sum(terms) / 3, rel=1e-6)


def test_grpos_paper_averages_each_answer_first() -> None:
    """DeepSeekMath 2024, eq. 3 without its KL: 1 / G sum_i 1 / |o_i| sum_t min(r A, clip(r) A)."""
    new, old, ratio = ratios()
    advantage = [1.0, -2.0, 0.5]
    answers = [
        sum(min(r * a, clip(r, 0.2, 0.2) * a) for r in rs) / len(rs)
        for rs, a in zip(ratio, advantage, strict=True)
    ]
    found = losses.grpo(new, old, torch.tensor(advantage), MASK, loss_over="answers")
    assert mean_loss(found) == pytest.approx(-sum(answers) / 3, rel=1e-6)


def test_gspo_has_one_ratio_for_an_answer() -> None:
    """GSPO (Zheng et al. 2025, eq. 5 and 7): s_i = (prod r)^(1/|o_i|), 1 / G sum_i min(s A, clip(s) A)."""
    new, old, ratio = ratios()
    advantage = [1.0, -2.0, 0.5]
    mean_ratio = [math.prod(rs) ** (1 / len(rs)) for rs in ratio]
    terms = [min(s * a, clip(s, 3e-4, 4e-4) * a) for s, a in zip(mean_ratio, advantage, strict=True)]
    found = losses.grpo(
        new, old, torch.tensor(advantage), MASK,
        ratio="sequence", loss_over="answers", clip_low=3e-4, clip_high=4e-4,
    )  # fmt: skip
    assert mean_loss(found) == pytest.approx(-sum(terms) / 3, rel=1e-6)


def test_rloo_weighs_the_whole_answers_log_probability() -> None:
    """RLOO (Ahmadian et al. 2024): 1 / k sum_i (R_i - mean of the others) log p(y_i)."""
    new, _, _ = ratios()
    advantage = [r - (sum(REWARDS) - r) / 2 for r in REWARDS]
    assert advantages_of_group(REWARDS, "leave_one_out") == pytest.approx(advantage)
    sums = [sum(float(new[i, t]) for t in range(3) if MASK[i, t]) for i in range(3)]
    found = losses.reinforce(new, torch.tensor(advantage), MASK, loss_over="sums")
    terms = [a * logp for a, logp in zip(advantage, sums, strict=True)]
    assert mean_loss(found) == pytest.approx(-sum(terms) / 3, rel=1e-6)


def test_reinforce_plus_plus_baseline_normalises_over_the_step_and_has_k2() -> None:
    """REINFORCE++-baseline (Hu 2025): A' = R - mean of the group, A = (A' - mean A') / std A' of the step."""
    centred = [r - sum(REWARDS) / 3 for r in REWARDS]
    assert advantages_of_group(REWARDS, "batch") == pytest.approx(centred)
    tokens = [a for a, length in zip(centred, (3, 1, 2), strict=True) for _ in range(length)]
    mean = sum(tokens) / 6
    deviation = (sum((a - mean) ** 2 for a in tokens) / 6) ** 0.5
    expected = [(a - mean) / deviation for a in centred]
    assert normalised(centred, [3, 1, 2]) == pytest.approx(expected, rel=1e-6)
    new, old, ratio = ratios()
    reference = random(3, 3, seed=7, scale=0.4)
    k2 = sum(float(reference[i, t] - new[i, t]) ** 2 / 2 for i in range(3) for t in range(3) if MASK[i, t])
    terms = [min(r * a, clip(r, 0.2, 0.2) * a) for rs, a in zip(ratio, expected, strict=True) for r in rs]
    found = losses.grpo(
        new, old, torch.tensor(expected), MASK,
        reference_logprobs_BT=reference, kl_coefficient=0.1, kl_estimator="k2",
    )  # fmt: skip
    assert mean_loss(found) == pytest.approx((0.1 * k2 - sum(terms)) / 6, rel=1e-6)


def test_importance_weights_multiply_the_surrogate_and_not_the_kl() -> None:
    new, old, ratio = ratios()
    weights = random(3, 3, seed=9).abs()
    found = losses.grpo(
        new, old, torch.ones(3), MASK,
        reference_logprobs_BT=new - 1, kl_coefficient=0.1, weights_BT=weights, clip_low=9, clip_high=9,
    )  # fmt: skip
    flat = [float(weights[i, t]) for i in range(3) for t in range(3) if MASK[i, t]]
    gains = [w * r for w, r in zip(flat, (r for rs in ratio for r in rs), strict=True)]
    assert mean_loss(found) == pytest.approx(0.1 * math.exp(-1) - sum(gains) / 6, rel=1e-6)


def test_kl_estimators_average_to_the_true_kl() -> None:
    policy, reference = random(8, seed=1).log_softmax(0), random(8, seed=2).log_softmax(0)
    true_kl = float((policy.exp() * (policy - reference)).sum())
    estimates = losses.kl_estimators(policy, reference)
    assert float((policy.exp() * estimates.k1).sum()) == pytest.approx(true_kl, rel=1e-12)
    assert float((policy.exp() * estimates.k3).sum()) == pytest.approx(true_kl, rel=1e-12)
    assert (estimates.k2 >= 0).all()
    assert (estimates.k3 >= 0).all()


# ---- the loss law


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_sums_and_counts_of_parts_add_up_to_the_whole(cut: int) -> None:
    policy, reference, reward = random(6, seed=1), random(6, seed=2), random(6, seed=3)
    whole = losses.rpo(policy, reference, reward, beta=0.3, eta=1.0)
    parts = [
        losses.rpo(policy[part], reference[part], reward[part], beta=0.3, eta=1.0)
        for part in (slice(None, cut), slice(cut, None))
    ]
    assert float(sum(part.sum for part in parts)) == pytest.approx(float(whole.sum), rel=1e-14)
    assert float(sum(part.count for part in parts)) == float(whole.count)
