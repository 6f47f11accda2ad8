"""From the logits of one position to one token: penalties, filters, draw. Pure functions of tensors.

Shape suffixes: R = rows, V = vocabulary, C = candidates that survived the filters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron4.engine import PositionLogprobs, SamplingParams, TokenLogprob
from nemotron4.inference.native.library import sampler

# Top-p looks at this many of the most likely tokens first; only a flat distribution needs a full sort.
NUCLEUS_GUESS = 512


def argmax(logits_RV: Tensor) -> list[int]:
    """The first largest of each row."""
    # numpy compares many numbers at once, torch on a CPU one after the other.
    largest_R = logits_RV.numpy().argmax(-1) if logits_RV.device.type == "cpu" else logits_RV.argmax(-1)
    indices: list[int] = largest_R.tolist()
    return indices


def changes_logits(params: SamplingParams, num_new: int) -> bool:
    """Whether ``adjust`` would do anything at this position."""
    return bool(
        params.logit_bias
        or (num_new < params.min_new_tokens and params.min_tokens_masks)
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
    )


def adjust(
    logits_V: Tensor, params: SamplingParams, *, prompt_ids: Sequence[int], new_ids: Sequence[int]
) -> Tensor:
    """Logit bias, minimum length, then the penalties; returns a new tensor.

    The repetition penalty divides positive and multiplies negative logits of every token in the prompt or the
    new text (Keskar et al. 2019, with the sign rule that transformers uses). Presence and frequency penalties
    count new tokens only, as in the OpenAI API.
    """
    logits_V = logits_V.clone()
    for token_id, bias in params.logit_bias.items():
        logits_V[token_id] += bias
    if len(new_ids) < params.min_new_tokens:
        logits_V[list(params.min_tokens_masks)] = -torch.inf
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt_ids, *new_ids}), device=logits_V.device)
        values = logits_V[seen]
        penalty = params.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if new_ids and (params.presence_penalty or params.frequency_penalty):
        ids, counts = torch.unique(torch.tensor(new_ids, device=logits_V.device), return_counts=True)
        logits_V[ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits_V


def masked(logits_V: Tensor, allowed_V: Tensor) -> Tensor:
    """Only the allowed tokens; a document that may only end does so before the minimum of tokens."""
    left_V = torch.where(allowed_V, logits_V, -torch.inf)
    return torch.where(allowed_V, 0.0, -torch.inf) if left_V.max() == -torch.inf else left_V


def draw(logits_V: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token id from adjusted float32 logits; temperature 0 is the first largest.

    The draw inverts the cumulative distribution of the candidates with one float64 from ``generator``.
    """
    if params.temperature == 0:
        return int(logits_V.argmax())
    point = torch.rand((), dtype=torch.float64, generator=generator)
    kernels = sampler() if logits_V.device.type == "cpu" else None
    if kernels is None:
        return draw_at(logits_V, params, point)
    logits_V = logits_V.float().contiguous()
    token_id: int = kernels.native_draw(
        logits_V.data_ptr(), len(logits_V), params.temperature, params.top_k, params.top_p, params.min_p,
        float(point),
    )  # fmt: skip
    return token_id


def draw_at(logits_V: Tensor, params: SamplingParams, point: Tensor) -> int:
    """The token at a point in [0, 1) of the cumulative distribution; the twin of ``native_draw``."""
    ids_C, probabilities_C = candidates(logits_V / params.temperature, params)
    cumulative_C = probabilities_C.double().cumsum(0)
    scaled = point.to(cumulative_C.device) * cumulative_C[-1]
    chosen = int(torch.searchsorted(cumulative_C, scaled, right=True).clamp(max=len(cumulative_C) - 1))
    return chosen if ids_C is None else int(ids_C[chosen])


def candidates(scaled_V: Tensor, params: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """Token ids and probabilities that survive top-k, top-p and min-p; ids None means the whole vocabulary.

    Top-k keeps every tie of the k-th largest. Top-p keeps tokens, most likely first, until the probability
    before a token exceeds p: the token that crosses p stays. Min-p keeps what has at least min_p times the
    largest probability.
    """
    ids_C: Tensor | None = None
    if 0 < params.top_k < len(scaled_V):
        smallest_kept = scaled_V.topk(params.top_k).values[-1]
        ids_C = (scaled_V >= smallest_kept).nonzero()[:, 0]
    values_C = scaled_V if ids_C is None else scaled_V[ids_C]
    probabilities_C = torch.softmax(values_C, 0)
    if params.top_p < 1:
        kept = _nucleus(probabilities_C, params.top_p)
        ids_C = kept if ids_C is None else ids_C[kept]
        probabilities_C = probabilities_C[kept]
    if params.min_p > 0:
        kept = (probabilities_C >= params.min_p * probabilities_C.max()).nonzero()[:, 0]
        ids_C = kept if ids_C is None else ids_C[kept]
        probabilities_C = probabilities_C[kept]
    return ids_C, probabilities_C


def _nucleus(probabilities_C: Tensor, top_p: float) -> Tensor:
    """Indices of the smallest set of most likely candidates whose probability exceeds ``top_p``."""
    guess = min(NUCLEUS_GUESS, len(probabilities_C))
    values, indices = probabilities_C.topk(guess)
    if values.double().sum() <= top_p:
        values, indices = probabilities_C.sort(descending=True, stable=True)
    before = values.double().cumsum(0) - values
    return indices[before <= top_p]


def logprobs(
    raw_logits_RW: Tensor, token_ids: Sequence[int], *, vocab_size: int, num_top: int, is_full: bool
) -> list[PositionLogprobs]:
    """Per row: log-probabilities of the raw model at temperature 1, in nats, computed in float32.

    W: the output layer's width, over which they are normalised; rows behind ``vocab_size`` are not listed.
    """
    logprobs_RV = torch.log_softmax(raw_logits_RW.float(), -1)[:, :vocab_size]
    chosen_R = logprobs_RV.gather(1, torch.tensor(token_ids, device=logprobs_RV.device)[:, None])[:, 0]
    tops: list[tuple[TokenLogprob, ...]] = [()] * len(token_ids)
    if num_top:
        top = logprobs_RV.topk(min(num_top, logprobs_RV.shape[1]))
        tops = [
            tuple(map(TokenLogprob, ids, values))
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
    fulls = logprobs_RV.tolist() if is_full else [None] * len(token_ids)
    return [
        PositionLogprobs(TokenLogprob(token_id, chosen), top, full)
        for token_id, chosen, top, full in zip(token_ids, chosen_R.tolist(), tops, fulls, strict=True)
    ]
