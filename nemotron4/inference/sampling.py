"""From the logits of one position to one token: penalties, filters, draw. Pure functions of arrays.

Shape suffixes: R = rows, V = vocabulary, C = candidates that survived the filters.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from nemotron4.engine import PositionLogprobs, SamplingParams, TokenLogprob
from nemotron4.inference.native.library import CDraw, sampler

Array = np.ndarray[Any, np.dtype[Any]]


class _NoEntropy(np.random.bit_generator.ISeedSequence):
    """For a generator that is seeded afterwards: NumPy's own sequence mixes 624 words in 80 us."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Array:
        return np.ones(n_words, dtype)


class Points:
    """A request's random numbers: float64 in [0, 1), those of ``torch.rand`` with this seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed % 2**32

    @functools.cached_property
    def _words(self) -> np.random.RandomState:  # 3 KB, which a greedy or waiting request does not need
        # NumPy takes every ISeedSequence; its stub names one of them.
        words = np.random.RandomState(np.random.MT19937(_NoEntropy()))  # type: ignore[arg-type]
        words.seed(self._seed)
        return words

    def next(self) -> float:
        high, low = self._words.randint(0, 2**32, size=2, dtype=np.uint32).tolist()
        return float((high << 32 | low) & (2**53 - 1)) / 2**53


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
    logits_V: Array, params: SamplingParams, *, prompt_ids: Sequence[int], new_ids: Sequence[int]
) -> Array:
    """Logit bias, minimum length, then the penalties; returns a new array.

    The repetition penalty divides positive and multiplies negative logits of every token in the prompt or the
    new text (Keskar et al. 2019, with the sign rule that transformers uses). Presence and frequency penalties
    count new tokens only, as in the OpenAI API.
    """
    logits_V = logits_V.copy()
    for token_id, bias in params.logit_bias.items():
        logits_V[token_id] += bias
    if len(new_ids) < params.min_new_tokens:
        logits_V[list(params.min_tokens_masks)] = -np.inf
    if params.repetition_penalty != 1:
        seen = np.unique([*prompt_ids, *new_ids])
        values = logits_V[seen]
        penalty = np.float32(params.repetition_penalty)
        logits_V[seen] = np.where(values > 0, values / penalty, values * penalty)
    if new_ids and (params.presence_penalty or params.frequency_penalty):
        ids, counts = np.unique(new_ids, return_counts=True)
        penalties = params.presence_penalty + params.frequency_penalty * counts
        logits_V[ids] -= penalties.astype(logits_V.dtype)
    return logits_V


def masked(logits_V: Array, allowed_V: Array) -> Array:
    """Only the allowed tokens; a document that may only end does so before the minimum of tokens."""
    left_V = np.where(allowed_V, logits_V, np.float32(-np.inf))
    return np.where(allowed_V, np.float32(0), np.float32(-np.inf)) if left_V.max() == -np.inf else left_V


def draw(logits_V: Array, params: SamplingParams, points: Points) -> int:
    """One token id from adjusted float32 logits; temperature 0 is the first largest.

    The draw inverts the cumulative distribution of the candidates with one number of ``points``.
    """
    if params.temperature == 0:
        return int(logits_V.argmax())
    return draw_rows([(np.ascontiguousarray(logits_V, np.float32), params, points.next())])[0]


def draw_rows(rows: Sequence[tuple[Array, SamplingParams, float]], *, handle: int | None = None) -> list[int]:
    """``draw_at`` for float32 rows, by the threads of the library's ``handle``."""
    kernels = sampler()
    if kernels is None:
        return [draw_at(*row) for row in rows]
    draws = c_draws([(logits_V.ctypes.data, len(logits_V), p, point) for logits_V, p, point in rows])
    kernels.native_draw(handle, draws, len(rows))
    return [each.token for each in draws]


def c_draws(rows: Sequence[tuple[int | None, int, SamplingParams, float]]) -> ctypes.Array[CDraw]:
    """What the library draws; of each: where its logits lie, how many there are, and how at which point."""
    return (CDraw * len(rows))(
        *(
            CDraw(address, size, p.top_k, p.temperature, p.top_p, p.min_p, point)
            for address, size, p, point in rows
        )
    )


def draw_at(logits_V: Array, params: SamplingParams, point: float) -> int:
    """The token at a point in [0, 1) of the cumulative distribution; the twin of the library's."""
    if params.temperature == 0:
        return int(logits_V.argmax())
    ids_C, probabilities_C = candidates(logits_V / np.float32(params.temperature), params)
    cumulative_C = probabilities_C.astype(np.float64).cumsum()
    chosen = int(np.searchsorted(cumulative_C, point * cumulative_C[-1], side="right"))
    chosen = min(chosen, len(cumulative_C) - 1)
    return chosen if ids_C is None else int(ids_C[chosen])


def candidates(scaled_V: Array, params: SamplingParams) -> tuple[Array | None, Array]:
    """Token ids and probabilities that survive top-k, top-p and min-p; ids None means the whole vocabulary.

    Top-k keeps every tie of the k-th largest. Top-p keeps tokens, most likely first, until the probability
    before a token exceeds p: the token that crosses p stays. Min-p keeps what has at least min_p times the
    largest probability.
    """
    ids_C: Array | None = None
    if 0 < params.top_k < len(scaled_V):
        smallest_kept = np.partition(scaled_V, -params.top_k)[-params.top_k]
        ids_C = (scaled_V >= smallest_kept).nonzero()[0]
    values_C = scaled_V if ids_C is None else scaled_V[ids_C]
    weights_C = np.exp(values_C - values_C.max())
    probabilities_C: Array = weights_C / weights_C.sum()
    if params.top_p < 1:
        kept = _nucleus(probabilities_C, params.top_p)
        ids_C = kept if ids_C is None else ids_C[kept]
        probabilities_C = probabilities_C[kept]
    if params.min_p > 0:
        kept = (probabilities_C >= params.min_p * probabilities_C.max()).nonzero()[0]
        ids_C = kept if ids_C is None else ids_C[kept]
        probabilities_C = probabilities_C[kept]
    return ids_C, probabilities_C


def _nucleus(probabilities_C: Array, top_p: float) -> Array:
    """Indices of the smallest set of most likely candidates whose probability exceeds ``top_p``."""
    order_C: Array = np.argsort(-probabilities_C, kind="stable")
    values_C = probabilities_C[order_C]
    before_C = values_C.astype(np.float64).cumsum() - values_C
    return order_C[before_C <= top_p]


def logprobs(
    raw_logits_RW: Array, token_ids: Sequence[int], *, vocab_size: int, num_top: int, is_full: bool
) -> list[PositionLogprobs]:
    """Per row: log-probabilities of the raw model at temperature 1, in nats, sums in float64.

    W: the output layer's width, over which they are normalised; rows behind ``vocab_size`` are not listed.
    """
    found: list[PositionLogprobs] = []
    for logits_W, token_id in zip(raw_logits_RW, token_ids, strict=True):
        largest = logits_W.max()
        total = np.exp(logits_W - largest).sum(dtype=np.float64)
        logprobs_V = logits_W[:vocab_size] - (largest + np.float32(np.log(total)))
        top: tuple[TokenLogprob, ...] = ()
        if num_top:
            ids = _largest(logprobs_V, min(num_top, len(logprobs_V)))
            top = tuple(map(TokenLogprob, ids.tolist(), logprobs_V[ids].tolist()))
        chosen = TokenLogprob(token_id, float(logprobs_V[token_id]))
        found.append(PositionLogprobs(chosen, top, logprobs_V.tolist() if is_full else None))
    return found


def _largest(values_V: Array, count: int) -> Array:
    """Indices of the largest values, largest first, the first of equals first."""
    smallest = np.partition(values_V, -count)[-count]
    ids: Array = (values_V >= smallest).nonzero()[0]
    return ids[np.argsort(-values_V[ids], kind="stable")][:count]
