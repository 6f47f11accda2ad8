"""Causal attention of whole sequences: torch's kernel, and on a CPU matrix products in blocks.

torch's CPU kernel works head by head and repeats keys and values for the queries that share them. Those are
one product here, for a block of positions and all sequences at once. On sequences of 512 both passes take
0.88 of the kernel's time; at 256 and from 768 on they take 1.1 to 1.6 times as long, and the kernel is used.

Shape suffixes: B = sequences, T = positions, H = query heads, K = key/value heads, G = H / K, E = head dim,
C = B * K, P = T * G (the queries of one key/value head, by position), p = those of one block, s = its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_POSITIONS = 64
SHORTEST_BLOCKED, LONGEST_BLOCKED = 384, 640


def causal_attention(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
    """(B, T, H, E): ``softmax(q k / sqrt(E)) v``, each position over itself and what is before it.

    With more keys than queries, the queries are the last positions.
    """
    num_before = k_BTKE.shape[1] - q_BTHE.shape[1]
    is_middling = SHORTEST_BLOCKED <= q_BTHE.shape[1] <= LONGEST_BLOCKED
    if q_BTHE.device.type == "cpu" and is_middling and not num_before:
        return blocked(q_BTHE, k_BTKE, v_BTKE)
    q_BHTE, k_BKTE, v_BKTE = (x.transpose(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    mask_TS = None
    if num_before:
        mask_TS = torch.ones(q_BTHE.shape[1], k_BTKE.shape[1], dtype=torch.bool, device=q_BTHE.device)
        mask_TS = mask_TS.tril(num_before)
    out_BHTE = F.scaled_dot_product_attention(
        q_BHTE,
        k_BKTE,
        v_BKTE,
        attn_mask=mask_TS,
        is_causal=mask_TS is None,
        enable_gqa=q_BTHE.shape[2] != k_BTKE.shape[2],
    )
    return out_BHTE.transpose(1, 2)


def blocked(q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
    """The same by blocks of positions, whose probabilities take 64 / E of the memory of the queries."""
    out: Tensor = _Blocked.apply(q_BTHE, k_BTKE, v_BTKE)  # type: ignore[no-untyped-call]
    return out


class _Blocked(torch.autograd.Function):
    """Keeps queries, keys and values; the backward pass makes each block's probabilities again.

    Of 16-bit inputs the scores and probabilities are float32, the other products 16 bits.
    """

    @staticmethod
    def forward(ctx: Any, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
        ctx.save_for_backward(q_BTHE, k_BTKE, v_BTKE)
        q_CPE, k_CTE, v_CTE = (_by_kv_head(x, k_BTKE.shape[2]) for x in (q_BTHE, k_BTKE, v_BTKE))
        for queries, keys, probs_Cps in _blocks(q_CPE, k_CTE):
            # Over the block's queries, which have done their work.
            torch.bmm(probs_Cps.to(v_CTE.dtype), v_CTE[:, keys], out=q_CPE[:, queries])
        return _by_position(q_CPE, q_BTHE.shape)

    @staticmethod
    def backward(ctx: Any, grad_BTHE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHE, k_BTKE, v_BTKE = ctx.saved_tensors
        q_CPE, k_CTE, v_CTE, grad_CPE = (
            _by_kv_head(x, k_BTKE.shape[2]) for x in (q_BTHE, k_BTKE, v_BTKE, grad_BTHE)
        )
        wide = _wide(q_CPE.dtype)
        grad_k_CTE, grad_v_CTE = (torch.zeros_like(x, dtype=wide) for x in (k_CTE, v_CTE))
        memory = _block_memory(q_CPE, k_CTE)
        for queries, keys, probs_Cps in _blocks(q_CPE, k_CTE):
            grad_CpE = grad_CPE[:, queries]
            grad_v_CTE[:, keys] += torch.bmm(probs_Cps.to(q_CPE.dtype).mT, grad_CpE)
            slope_Cps = memory[: probs_Cps.numel()].view_as(probs_Cps)
            if wide == q_CPE.dtype:
                torch.bmm(grad_CpE, v_CTE[:, keys].mT, out=slope_Cps)
            else:
                slope_Cps.copy_(torch.bmm(grad_CpE, v_CTE[:, keys].mT))
            # d scores = p (d p - sum(p d p))
            torch._softmax_backward_data(slope_Cps, probs_Cps, -1, wide, grad_input=slope_Cps)
            slope_Cps = slope_Cps.to(q_CPE.dtype)
            grad_k_CTE[:, keys] += torch.bmm(slope_Cps.mT, q_CPE[:, queries])
            # The gradient of the block's queries in their place: they have done their work.
            torch.bmm(slope_Cps, k_CTE[:, keys], out=q_CPE[:, queries])
        scale = q_BTHE.shape[-1] ** -0.5
        return (
            _by_position(q_CPE.mul_(scale), q_BTHE.shape),
            _by_position(grad_k_CTE.mul_(scale).to(k_BTKE.dtype), k_BTKE.shape),
            _by_position(grad_v_CTE.to(v_BTKE.dtype), v_BTKE.shape),
        )


def _blocks(q_CPE: Tensor, k_CTE: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Each block's queries, the keys they see, and their probabilities: good until the next block."""
    num_heads, num_positions, head_dim = k_CTE.shape
    group = q_CPE.shape[1] // num_positions
    memory = _block_memory(q_CPE, k_CTE)
    above_TT = memory.new_full((BLOCK_POSITIONS, BLOCK_POSITIONS), -torch.inf).triu(1)
    k_CTE = k_CTE.to(memory.dtype)  # a product in 16 bits would round the scores
    mask_pT = above_TT.repeat_interleave(group, dim=0)
    for start in range(0, num_positions, BLOCK_POSITIONS):
        stop = min(start + BLOCK_POSITIONS, num_positions)
        queries, keys = slice(start * group, stop * group), slice(stop)
        q_CpE, k_CsE = q_CPE[:, queries].to(memory.dtype), k_CTE[:, keys]
        scores_Cps = memory[: num_heads * q_CpE.shape[1] * keys.stop].view(num_heads, -1, keys.stop)
        torch.baddbmm(scores_Cps, q_CpE, k_CsE.mT, beta=0, alpha=head_dim**-0.5, out=scores_Cps)
        scores_Cps[:, :, start:] += mask_pT[: q_CpE.shape[1], : stop - start]
        # In place: each number is read before it is written.
        torch.ops.aten._softmax.out(scores_Cps, -1, False, out=scores_Cps)
        yield queries, keys, scores_Cps


def _block_memory(q_CPE: Tensor, k_CTE: Tensor) -> Tensor:
    """Room for the scores of any block: fresh memory for each would cost page faults."""
    size = q_CPE.shape[0] * BLOCK_POSITIONS * q_CPE.shape[1]
    return q_CPE.new_empty(size, dtype=_wide(q_CPE.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _by_kv_head(x_BTHE: Tensor, num_kv_heads: int) -> Tensor:
    """(C, P, E), a copy: query heads of a key/value head side by side; G = 1 for keys and values."""
    num_sequences, num_positions, _, head_dim = x_BTHE.shape
    grouped_BTKGE = x_BTHE.view(num_sequences, num_positions, num_kv_heads, -1, head_dim)
    copy_BKTGE = grouped_BTKGE.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return copy_BKTGE.flatten(2, 3).flatten(0, 1)


def _by_position(x_CPE: Tensor, shape: torch.Size) -> Tensor:
    """Back to (B, T, H, E)."""
    num_sequences, num_positions, _, head_dim = shape
    x_BKTGE = x_CPE.view(num_sequences, -1, num_positions, x_CPE.shape[1] // num_positions, head_dim)
    return x_BKTGE.transpose(1, 2).reshape(shape)
