"""The chunked log-probabilities against the obvious form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron4.training import logprobs
from nemotron4.training.logprobs import token_logprobs, token_logprobs_and_entropies


def plain_token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """The slow twin: the whole logits tensor at once."""
    return (hidden_ND @ weight_VD.T).log_softmax(dim=-1).gather(1, target_N[:, None])[:, 0]


def _inputs(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden_ND = torch.randn(num_tokens, 12, generator=generator, dtype=dtype)
    weight_VD = torch.randn(31, 12, generator=generator, dtype=dtype)
    target_N = torch.randint(31, (num_tokens,), generator=generator)
    upstream_N = torch.randn(num_tokens, generator=generator, dtype=dtype)
    return hidden_ND, weight_VD, target_N, upstream_N


def _value_and_gradients(function, hidden_ND, weight_VD, target_N, upstream_N):
    hidden_ND, weight_VD = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    logprobs_N = function(hidden_ND, weight_VD, target_N)
    (logprobs_N * upstream_N).sum().backward()
    return logprobs_N.detach(), hidden_ND.grad, weight_VD.grad


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 23])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 64])
def test_value_and_gradients_equal_the_plain_form(num_tokens: int, chunk_tokens: int) -> None:
    inputs = _inputs(num_tokens, torch.float32)
    expected = _value_and_gradients(plain_token_logprobs, *inputs)
    actual = _value_and_gradients(lambda h, w, t: token_logprobs(h, w, t, chunk_tokens=chunk_tokens), *inputs)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("chunk_tokens", [4, 64])
def test_a_slope_known_before_gives_the_same_value_and_gradients(chunk_tokens: int) -> None:
    *inputs, upstream_N = _inputs(23, torch.float32)
    upstream_N = torch.full_like(upstream_N, -0.3)
    expected = _value_and_gradients(plain_token_logprobs, *inputs, upstream_N)
    actual = _value_and_gradients(
        lambda h, w, t: token_logprobs(h, w, t, slope=float(upstream_N[0]), chunk_tokens=chunk_tokens),
        *inputs,
        upstream_N,
    )
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("chunk_tokens", [4, 64])
def test_entropies_beside_them_equal_the_plain_form(chunk_tokens: int) -> None:
    *inputs, upstream_N = _inputs(23, torch.float64)
    upstream_N2 = torch.stack((upstream_N, upstream_N.flip(0)), dim=1)

    def plain(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        distribution = torch.distributions.Categorical(logits=hidden_ND @ weight_VD.T)
        return torch.stack((distribution.log_prob(target_N), distribution.entropy()), dim=1)

    expected = _value_and_gradients(plain, *inputs, upstream_N2)
    actual = _value_and_gradients(
        lambda h, w, t: token_logprobs_and_entropies(h, w, t, chunk_tokens=chunk_tokens), *inputs, upstream_N2
    )
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_another_slope_than_promised_is_noticed() -> None:
    hidden_ND, weight_VD, target_N, _ = _inputs(5, torch.float32)
    logprobs_N = token_logprobs(hidden_ND.requires_grad_(), weight_VD, target_N, slope=-0.5)
    with pytest.raises(AssertionError, match="another slope"):
        (-0.25 * logprobs_N).sum().backward()


def test_gradients_agree_with_finite_differences() -> None:
    hidden_ND, weight_VD, target_N, _ = _inputs(5, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, target_N, chunk_tokens=2),
        (hidden_ND.requires_grad_(), weight_VD.requires_grad_()),
    )


def test_frozen_weight_gets_no_gradient() -> None:
    hidden_ND, weight_VD, target_N, _ = _inputs(5, torch.float32)
    hidden_ND.requires_grad_()
    token_logprobs(hidden_ND, weight_VD, target_N, chunk_tokens=2).sum().backward()
    assert weight_VD.grad is None
    assert hidden_ND.grad is not None


def test_extreme_logits_stay_finite() -> None:
    hidden_ND, weight_VD, target_N, upstream_N = _inputs(9, torch.float32)
    values = _value_and_gradients(token_logprobs, hidden_ND * 1e4, weight_VD, target_N, upstream_N)
    assert all(value.isfinite().all() for value in values)


def test_bfloat16_inputs_give_float32_logprobs_and_gradients_of_their_own_type() -> None:
    hidden_ND, weight_VD, target_N, upstream_N = _inputs(9, torch.float32)
    half = (hidden_ND.bfloat16(), weight_VD.bfloat16())
    logprobs_N, grad_hidden_ND, grad_weight_VD = _value_and_gradients(
        lambda h, w, t: token_logprobs(h, w, t, chunk_tokens=4), *half, target_N, upstream_N
    )
    assert logprobs_N.dtype == torch.float32
    assert grad_hidden_ND.dtype == grad_weight_VD.dtype == torch.bfloat16
    torch.testing.assert_close(
        logprobs_N, plain_token_logprobs(hidden_ND, weight_VD, target_N), rtol=0.05, atol=0.1
    )


def test_the_weights_gradient_in_16_bits_is_made_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = _inputs(9, torch.float64)
    half = (exact[0].bfloat16(), exact[1].bfloat16(), exact[2], exact[3].float())
    *_, expected_VD = _value_and_gradients(plain_token_logprobs, *exact)
    for size in (1, 7, 31, 64):
        monkeypatch.setattr(logprobs, "SLICE_IDS", size)
        *_, grad_VD = _value_and_gradients(lambda h, w, t: token_logprobs(h, w, t, chunk_tokens=4), *half)
        torch.testing.assert_close(grad_VD.double(), expected_VD, rtol=0.05, atol=0.1)


def test_no_tokens_give_no_logprobs() -> None:
    hidden_ND, weight_VD, target_N, _ = _inputs(0, torch.float32)
    logprobs_N = token_logprobs(hidden_ND.requires_grad_(), weight_VD.requires_grad_(), target_N)
    logprobs_N.sum().backward()
    assert logprobs_N.shape == (0,)
    assert not weight_VD.grad.any()
