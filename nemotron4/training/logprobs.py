"""Token log-probabilities that never hold the whole logits tensor.

The logits of a batch are tokens x vocabulary: 2 GB in float32 for 10,000 tokens of a 49,152-word model. Here
they exist for one chunk of tokens at a time, in the forward pass and again, recomputed, in the backward.

Legend: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 512


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """log softmax(hidden @ weight^T)[target] in nats, in float32 or wider.

    Only positions whose log-probability is used should be passed: prompt tokens cost as much as others.
    """
    result: Tensor = _ChunkedLogprobs.apply(hidden_ND, weight_VD, target_N, chunk_tokens)  # type: ignore[no-untyped-call]
    return result


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk_tokens: int
    ) -> Tensor:
        logprobs, normalisers = [], []
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            stop = start + chunk_tokens
            logits_cV = _wide(hidden_ND[start:stop] @ weight_VD.T)
            normaliser_c = logits_cV.logsumexp(dim=-1)
            logprobs.append(logits_cV.gather(1, target_N[start:stop, None])[:, 0] - normaliser_c)
            normalisers.append(normaliser_c)
        empty = _wide(hidden_ND.new_empty(0))
        ctx.save_for_backward(hidden_ND, weight_VD, target_N, torch.cat(normalisers or [empty]))
        ctx.chunk_tokens = chunk_tokens
        return torch.cat(logprobs or [empty])

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
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
            grad_cV.scatter_add_(1, target_N[start:stop, None], grad_c[:, None])
            narrow_cV = grad_cV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[start:stop] = narrow_cV @ weight_VD
            if grad_weight_VD is not None:
                if grad_weight_VD.dtype == hidden_cD.dtype:
                    grad_weight_VD.addmm_(narrow_cV.T, hidden_cD)
                else:
                    grad_weight_VD += narrow_cV.T @ hidden_cD
        if grad_weight_VD is not None:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_ND, grad_weight_VD, None, None
