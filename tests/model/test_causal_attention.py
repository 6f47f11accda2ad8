"""Attention in blocks against torch's kernel, its slow twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron4.model import causal_attention
from nemotron4.model.attention import CausalAttend
from nemotron4.training.packing import PackedAttend

BLOCK = causal_attention.BLOCK_POSITIONS


def inputs(
    num_sequences: int, num_positions: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_positions)

    def random(heads: int) -> Tensor:
        shape = (num_sequences, num_positions, heads, 16)
        return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()

    return random(num_heads), random(num_kv_heads), random(num_kv_heads)


def by_torch(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("num_positions", [1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 5 * BLOCK + 7])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (3, 3), (4, 1)])
def test_blocks_give_the_output_and_gradients_of_the_kernel(
    num_positions: int, num_heads: int, num_kv_heads: int
) -> None:
    qkv = inputs(2, num_positions, num_heads, num_kv_heads, torch.float64)
    actual, expected = causal_attention.blocked(*qkv), by_torch(*qkv)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(actual, qkv, upstream), torch.autograd.grad(expected, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_blocks_are_as_near_to_the_truth_as_the_kernel(size: float, narrow: torch.dtype) -> None:
    qkv = inputs(1, 300, 6, 2, narrow)
    upstream = torch.randn(1, 300, 6, 16).to(narrow)

    def outcome(attend: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in qkv)
        out = attend(size * q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), upstream.to(dtype))]

    truth = outcome(by_torch, torch.float64)
    ours, torchs = outcome(causal_attention.blocked, narrow), outcome(by_torch, narrow)
    for got, peer, want in zip(ours, torchs, truth, strict=True):
        rounding = 8 * torch.finfo(narrow).eps * float(want.abs().max())
        assert (got - want).abs().max() <= 3 * (peer - want).abs().max() + rounding


def test_sequences_of_some_length_on_a_cpu_go_by_blocks_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []

    def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        taken.append(q.shape[1])
        return by_torch(q, k, v)

    monkeypatch.setattr(causal_attention, "blocked", blocked)
    shortest, longest = causal_attention.SHORTEST_BLOCKED, causal_attention.LONGEST_BLOCKED
    for length, dtype in [
        (shortest, torch.float32),
        (shortest - 1, torch.float32),
        (shortest, torch.bfloat16),
        (longest, torch.float64),
        (longest + 1, torch.float32),
    ]:
        qkv = inputs(1, length, 4, 2, dtype)
        assert CausalAttend()(0, *qkv).dtype == dtype
    assert taken == [shortest, shortest, longest]


def test_long_and_short_segments_of_a_row_are_those_of_rows_of_their_own() -> None:
    lengths = [400, 400, 20, 384]
    qkv = inputs(1, sum(lengths), 4, 2, torch.float32)
    together = PackedAttend([(length,) for length in lengths])(0, *(x[0] for x in qkv))
    parts = zip(*(x.split(lengths, dim=1) for x in qkv), strict=True)
    alone = torch.cat([by_torch(*part)[0] for part in parts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("before", [30, 300])
def test_the_last_positions_alone_are_those_of_the_whole(before: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(2, before + 90, 4, 2, dtype)
    whole = causal_attention.causal_attention(q, k, v)[:, before:]
    last = causal_attention.causal_attention(q[:, before:], k, v)
    close = 1e-9 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(last, whole, rtol=close, atol=close)
    gradients = [torch.autograd.grad(out.double().sin().sum(), (q, k, v)) for out in (whole, last)]
    for got, want in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(got, want, rtol=close, atol=close)


def test_a_not_finite_number_is_not_hidden() -> None:
    q, k, v = inputs(1, 300, 2, 2, torch.float32)
    with torch.no_grad():
        v[0, 100] = torch.nan
    out = causal_attention.blocked(q, k, v)
    assert out[0, :64].isfinite().all()
    assert out[0, 100:].isnan().all()
