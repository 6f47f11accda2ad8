"""The sampling rules of ``SamplingParams`` for one position, in plain numpy: slow, obvious, no torch.

V = vocabulary
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nemotron4.engine import PositionLogprobs, SamplingParams, TokenLogprob

Floats = npt.NDArray[np.float64]


def draw(
    logits_V: Floats,
    prompt_ids: Sequence[int],
    new_ids: Sequence[int],
    params: SamplingParams,
    generator: random.Random,
) -> int:
    """The next token id, by the filters in the order that ``SamplingParams`` documents."""
    logits_V = _penalised(logits_V.copy(), prompt_ids, new_ids, params)
    if params.temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = _filtered(logits_V, params)
    cumulative_V = np.cumsum(probabilities_V)
    point = generator.random() * cumulative_V[-1]
    chosen = int(np.searchsorted(cumulative_V, point, side="right"))
    return min(chosen, int(np.flatnonzero(probabilities_V)[-1]))


def position_logprobs(logits_V: Floats, token_id: int, *, num_top: int, is_full: bool) -> PositionLogprobs:
    """Raw log-probabilities (nats, temperature 1) at one position."""
    logprobs_V = logits_V - logits_V.max()
    logprobs_V -= np.log(np.exp(logprobs_V).sum())
    order = np.argsort(-logprobs_V, kind="stable")[:num_top]
    return PositionLogprobs(
        chosen=TokenLogprob(token_id, float(logprobs_V[token_id])),
        top=tuple(TokenLogprob(int(i), float(logprobs_V[i])) for i in order),
        full=logprobs_V.tolist() if is_full else None,
    )


def _penalised(
    logits_V: Floats, prompt_ids: Sequence[int], new_ids: Sequence[int], params: SamplingParams
) -> Floats:
    for token_id, bias in params.logit_bias.items():
        logits_V[token_id] += bias
    if len(new_ids) < params.min_new_tokens and params.min_tokens_masks:
        logits_V[sorted(params.min_tokens_masks)] = -np.inf
    if params.repetition_penalty != 1:
        for token_id in {*prompt_ids, *new_ids}:
            is_positive = logits_V[token_id] > 0
            logits_V[token_id] *= 1 / params.repetition_penalty if is_positive else params.repetition_penalty
    for token_id, count in Counter(new_ids).items():
        logits_V[token_id] -= params.presence_penalty + params.frequency_penalty * count
    return logits_V


def _filtered(logits_V: Floats, params: SamplingParams) -> Floats:
    # The best logit is moved to 0 first: no temperature then overflows.
    with np.errstate(over="ignore"):
        logits_V = (logits_V - logits_V.max()) / params.temperature
    if 0 < params.top_k < len(logits_V):
        kth = np.sort(logits_V)[-params.top_k]
        logits_V = np.where(logits_V >= kth, logits_V, -np.inf)
    probabilities_V = np.exp(logits_V)
    probabilities_V /= probabilities_V.sum()
    if params.top_p < 1:
        order = np.argsort(-probabilities_V, kind="stable")
        before = np.cumsum(probabilities_V[order]) - probabilities_V[order]
        is_dropped = before > params.top_p
        is_dropped[0] = False
        probabilities_V[order[is_dropped]] = 0
    if params.min_p > 0:
        probabilities_V[probabilities_V < params.min_p * probabilities_V.max()] = 0
    return probabilities_V
