"""Token log-probabilities that never hold the whole logits tensor.

The logits of a batch are tokens x vocabulary: 2 GB in float32 for 10,000 tokens of a 49,152-word model. Here
they exist for one chunk of tokens at a time. The backward pass computes them again, unless the loss's slope
is known before: then a chunk's gradients are made while its logits are there, a quarter of the work less.

Legend: N tokens, c tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemotron4.training.losses import wide

CHUNK_TOKENS = 512
SLICE_IDS = 4096  # of a weight gradient in 16 bits, whose product and sum stay near the processor


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    *,
    slope: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """log softmax(hidden @ weight^T)[target] in nats, in float32 or wider.

    ``slope`` promises the loss's derivative to every result, where it is one number known before.
    Only positions whose log-probability is used should be passed: prompt tokens cost as much as others.
    A weight whose vocabulary is split over processes gives the same numbers on each of them.
    """
    own_VD, group, first_id = _own_part(weight_VD)
    result: Tensor = _ChunkedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden_ND, own_VD, target_N, slope, chunk_tokens, group, first_id
    )
    return result


def token_logprobs_and_entropies(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """The same log-probabilities and the entropies of their distributions, (N, 2), in nats."""
    own_VD, group, first_id = _own_part(weight_VD)
    result: Tensor = _ChunkedEntropies.apply(  # type: ignore[no-untyped-call]
        hidden_ND, own_VD, target_N, chunk_tokens, group, first_id
    )
    return result


def _own_part(weight_VD: Tensor) -> tuple[Tensor, dist.ProcessGroup | None, int]:
    """This process's rows of the output weight, who has the others, and the id of the first one."""
    if not isinstance(weight_VD, DTensor):
        return weight_VD, None, 0
    mesh = weight_VD.device_mesh
    local_VD = weight_VD.to_local()
    return local_VD, mesh.get_group(), local_VD.shape[0] * mesh.get_local_rank()


class _ChunkedLogprobs(torch.autograd.Function):
    """With a group, each process holds the vocabulary's rows from ``first_id`` on and all have all tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        slope: float | None,
        chunk_tokens: int,
        group: dist.ProcessGroup | None,
        first_id: int,
    ) -> Tensor:
        gradients = _Gradients(hidden_ND, weight_VD, *ctx.needs_input_grad[:2]) if slope is not None else None
        logprobs = [wide(hidden_ND.new_empty(0))]
        chunks = _chunks(hidden_ND, weight_VD, target_N, chunk_tokens, group, first_id)
        for chunk, logprobs_cV, column_c1, is_mine_c1 in chunks:
            logprobs.append(_all_sum((logprobs_cV.gather(1, column_c1) * is_mine_c1)[:, 0], group))
            if gradients is not None and slope is not None:
                slope_c = logprobs_cV.new_full((len(logprobs_cV),), slope)
                gradients.add(chunk, _logprob_gradient(logprobs_cV, column_c1, is_mine_c1, slope_c))
        ctx.chunk_tokens, ctx.group, ctx.first_id = chunk_tokens, group, first_id
        ctx.slope, ctx.gradients = slope, gradients
        if gradients is None:
            ctx.save_for_backward(hidden_ND, weight_VD, target_N)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        gradients: _Gradients | None = ctx.gradients
        if gradients is None:
            hidden_ND, weight_VD, target_N = ctx.saved_tensors
            gradients = _Gradients(hidden_ND, weight_VD, *ctx.needs_input_grad[:2])
            chunks = _chunks(hidden_ND, weight_VD, target_N, ctx.chunk_tokens, ctx.group, ctx.first_id)
            for chunk, logprobs_cV, column_c1, is_mine_c1 in chunks:
                gradients.add(chunk, _logprob_gradient(logprobs_cV, column_c1, is_mine_c1, grad_N[chunk]))
        else:
            assert (grad_N == ctx.slope).all(), "the loss has another slope than it promised"
            ctx.gradients = None  # whoever gets them next may keep them without a copy
        return *gradients.finished(ctx.group), None, None, None, None, None


class _ChunkedEntropies(torch.autograd.Function):
    """Log-probability and entropy side by side; groups as in ``_ChunkedLogprobs``."""

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
        found = [wide(hidden_ND.new_empty((0, 2)))]
        chunks = _chunks(hidden_ND, weight_VD, target_N, chunk_tokens, group, first_id)
        for _, logprobs_cV, column_c1, is_mine_c1 in chunks:
            chosen_c = (logprobs_cV.gather(1, column_c1) * is_mine_c1)[:, 0]
            entropy_c = -(logprobs_cV.exp() * logprobs_cV).sum(dim=1)
            found.append(_all_sum(torch.stack((chosen_c, entropy_c), dim=1), group))
        ctx.chunk_tokens, ctx.group, ctx.first_id = chunk_tokens, group, first_id
        result_N2 = torch.cat(found)
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, result_N2[:, 1])
        return result_N2

    @staticmethod
    def backward(ctx: Any, grad_N2: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, target_N, entropy_N = ctx.saved_tensors
        gradients = _Gradients(hidden_ND, weight_VD, *ctx.needs_input_grad[:2])
        needs_entropy = bool(grad_N2[:, 1].any())
        chunks = _chunks(hidden_ND, weight_VD, target_N, ctx.chunk_tokens, ctx.group, ctx.first_id)
        for chunk, logprobs_cV, column_c1, is_mine_c1 in chunks:
            from_entropy_cV: Tensor | float = 0.0
            if needs_entropy:
                # d H / d logits = -p (log p + H)
                from_entropy_cV = (logprobs_cV + entropy_N[chunk, None]) * logprobs_cV.exp()
                from_entropy_cV *= -grad_N2[chunk, 1, None]
            gradient_cV = _logprob_gradient(logprobs_cV, column_c1, is_mine_c1, grad_N2[chunk, 0])
            gradients.add(chunk, gradient_cV.add_(from_entropy_cV))
        return *gradients.finished(ctx.group), None, None, None, None


class _Gradients:
    """Gradients of hidden states and output weight, added up chunk by chunk; None where not needed."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, needs_hidden: bool, needs_weight: bool) -> None:
        self._inputs = (hidden_ND, weight_VD)
        self._hidden_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        # The sum over chunks is kept wide: bf16 would lose the small terms.
        dtype = wide(hidden_ND.new_empty(0)).dtype
        self._weight_VD = torch.zeros_like(weight_VD, dtype=dtype) if needs_weight else None

    def add(self, chunk: slice, gradient_cV: Tensor) -> None:
        """One chunk's share, from the gradient of its logits."""
        hidden_ND, weight_VD = self._inputs
        narrow_cV = gradient_cV.to(hidden_ND.dtype)
        if self._hidden_ND is not None:
            self._hidden_ND[chunk] = narrow_cV @ weight_VD
        if self._weight_VD is not None:
            if self._weight_VD.dtype == hidden_ND.dtype:
                self._weight_VD.addmm_(narrow_cV.T, hidden_ND[chunk])
                return
            size = len(weight_VD) if weight_VD.is_cuda else SLICE_IDS
            for start in range(0, len(weight_VD), size):
                ids = slice(start, start + size)
                self._weight_VD[ids] += narrow_cV[:, ids].T @ hidden_ND[chunk]

    def finished(self, group: dist.ProcessGroup | None) -> tuple[Tensor | None, Tensor | None]:
        """(N, D) and (V, D), each in its input's type."""
        grad_hidden_ND = None if self._hidden_ND is None else _all_sum(self._hidden_ND, group)
        grad_weight_VD = None if self._weight_VD is None else self._weight_VD.to(self._inputs[1].dtype)
        return grad_hidden_ND, grad_weight_VD


def _chunks(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    chunk_tokens: int,
    group: dist.ProcessGroup | None,
    first_id: int,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Each chunk, its log-probabilities in this process's part of the vocabulary, and what ``_columns`` says.

    The log-probabilities are good until the next chunk: all share one buffer, because fresh memory for each
    cost 2 % of a step in page faults.
    """
    buffer_cV = hidden_ND.new_empty((min(chunk_tokens, len(hidden_ND)), len(weight_VD)))
    for start in range(0, len(hidden_ND), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        hidden_cD = hidden_ND[chunk]
        logits_cV = torch.mm(hidden_cD, weight_VD.T, out=buffer_cV[: len(hidden_cD)])
        yield (
            chunk,
            _log_softmax(wide(logits_cV), group),
            *_columns(target_N[chunk], first_id, len(weight_VD)),
        )


def _log_softmax(logits_cV: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """In the memory of the logits, but on a GPU alone."""
    if group is not None:
        return logits_cV.sub_(_all_logsumexp(logits_cV.logsumexp(dim=-1), group)[:, None])
    if logits_cV.is_cuda:
        return logits_cV.log_softmax(dim=-1)
    # One pass over memory where the general form takes five; each number is read before it is written.
    in_place: Tensor = torch.ops.aten._log_softmax.out(logits_cV, -1, False, out=logits_cV)
    return in_place


def _logprob_gradient(logprobs_cV: Tensor, column_c1: Tensor, is_mine_c1: Tensor, slope_c: Tensor) -> Tensor:
    """The logits' gradient, in the memory of the log-probabilities, which are used up."""
    # d log p(y) / d logits = onehot(y) - softmax
    gradient_cV = logprobs_cV.exp_().mul_(-slope_c[:, None])
    return gradient_cV.scatter_add_(1, column_c1, slope_c[:, None] * is_mine_c1)


def _columns(target_c: Tensor, first_id: int, num_ids: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this process's shard (0 where it is another's), and whether it is there."""
    column_c1 = target_c[:, None] - first_id
    is_mine_c1 = (column_c1 >= 0) & (column_c1 < num_ids)
    return column_c1.clamp(0, num_ids - 1), is_mine_c1


def _all_sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def _all_logsumexp(values_c: Tensor, group: dist.ProcessGroup) -> Tensor:
    highest_c = values_c.clone()
    dist.all_reduce(highest_c, dist.ReduceOp.MAX, group=group)
    return highest_c + _all_sum((values_c - highest_c).exp(), group).log()
