"""Token log-probabilities that never hold the whole logits tensor.

The logits of a batch are tokens x vocabulary: 2 GB in float32 for 10,000 tokens of a 49,152-word model. Here
they exist for one chunk of tokens at a time, in the forward pass and again, recomputed, in the backward.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

CHUNK_TOKENS = 512


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """log softmax(hidden @ weight^T)[target] in nats, in float32 or wider.

    Only positions whose log-probability is used should be passed: prompt tokens cost as much as others.
    A weight whose vocabulary is split over processes gives the same numbers on each of them.
    """
    group, first_id = None, 0
    if isinstance(weight_VD, DTensor):
        mesh = weight_VD.device_mesh
        group = mesh.get_group()
        weight_VD = weight_VD.to_local()
        first_id = weight_VD.shape[0] * mesh.get_local_rank()
    result: Tensor = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, target_N, chunk_tokens, group, first_id
    )
    return result


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _ChunkedLogprobs(torch.autograd.Function):
    """With a group, each process holds the vocabulary's rows from ``first_id`` on and all have all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        chunk_tokens: int,
        group: dist.ProcessGroup | None,
        first_id: int,
    ) -> Tensor:
        logprobs, normalisers = [], []
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            stop = start + chunk_tokens
            logits_cV = _wide(hidden_ND[start:stop] @ weight_VD.T)
            normaliser_c = _all_logsumexp(logits_cV.logsumexp(dim=-1), group)
            column_c1, is_mine_c1 = _columns(target_N[start:stop], first_id, weight_VD.shape[0])
            target_c = _all_sum((logits_cV.gather(1, column_c1) * is_mine_c1)[:, 0], group)
            logprobs.append(target_c - normaliser_c)
            normalisers.append(normaliser_c)
        empty = _wide(hidden_ND.new_empty(0))
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, torch.cat(normalisers or [empty]))
        ctx.chunk_tokens, ctx.group, ctx.first_id = chunk_tokens, group, first_id
        return torch.cat(logprobs or [empty])

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, target_N, normaliser_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        # The sum over chunks is kept wide: bf16 would lose the small terms.
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=normaliser_N.dtype) if needs_weight else None
        for start in range(0, hidden_ND.shape[0], ctx.chunk_tokens):
            stop = start + ctx.chunk_tokens
            hidden_cD, grad_c = hidden_ND[start:stop], grad_N[start:stop]
            logits_cV = _wide(hidden_cD @ weight_VD.T)
            # d log p(y) / d logits = onehot(y) - softmax
            grad_cV = (logits_cV - normaliser_N[start:stop, None]).exp_().mul_(-grad_c[:, None])
            column_c1, is_mine_c1 = _columns(target_N[start:stop], ctx.first_id, weight_VD.shape[0])
            grad_cV.scatter_add_(1, column_c1, grad_c[:, None] * is_mine_c1)
            narrow_cV = grad_cV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[start:stop] = narrow_cV @ weight_VD
            if grad_weight_VD is not None:
                if grad_weight_VD.dtype == hidden_cD.dtype:
                    grad_weight_VD.addmm_(narrow_cV.T, hidden_cD)
                else:
                    grad_weight_VD += narrow_cV.T @ hidden_cD
        if grad_hidden_ND is not None:
            grad_hidden_ND = _all_sum(grad_hidden_ND, ctx.group)
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None, None, None


def _columns(target_c: Tensor, first_id: int, num_ids: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this process's shard (0 where it is another's), and whether it is there."""
    column_c1 = target_c[:, None] - first_id
    is_mine_c1 = (column_c1 >= 0) & (column_c1 < num_ids)
    return column_c1.clamp(0, num_ids - 1), is_mine_c1


def _all_sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def _all_logsumexp(values_c: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return values_c
    highest_c = values_c.clone()
    dist.all_reduce(highest_c, dist.ReduceOp.MAX, group=group)
    return highest_c + _all_sum((values_c - highest_c).exp(), group).log()
