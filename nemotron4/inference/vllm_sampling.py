"""A request in vLLM's words, and vLLM's answers in ours. Pure functions; vLLM is imported when they run.

What ends a request is decided on our side, token by token: vLLM knows stop tokens, but neither NeMo's stop
strings nor our rule for the first match in a text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any

from nemotron4.engine import Grammar, PositionLogprobs, SamplingParams, TokenLogprob
from nemotron4.errors import RequestError

WHOLE_VOCABULARY = -1  # vLLM's number


def vllm_params(params: SamplingParams, *, vocab_size: int, width: int) -> Any:
    """The ``vllm.SamplingParams`` of one request: ids in, ids out, every token handed out as it comes.

    ``vocab_size``: ids from there to the output layer's ``width`` have no piece; they are neither drawn nor
    listed. RequestError for the one combination that vLLM cannot express.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind

    if params.hidden_mean:
        raise RequestError(
            "vLLM gives no hidden states of a model that writes text",
            hint="leave out --engine vllm, or serve an embedding model with vLLM itself",
        )
    if params.adapter is not None:
        raise RequestError(
            "vLLM runs here with one adapter, merged at its start", hint="serve --adapter PATH"
        )
    stop_ids = params.stop_token_ids
    if params.min_new_tokens and params.min_tokens_masks:
        # vLLM masks all ids that stop it, so it is told of those alone; the others stop on our side.
        if not params.min_tokens_masks <= stop_ids:
            raise RequestError(
                f"min_tokens_masks has ids that do not stop: {sorted(params.min_tokens_masks - stop_ids)}",
                hint="vLLM masks stop tokens only; add them to stop_token_ids",
            )
        stop_ids = params.min_tokens_masks
    is_sampled = params.temperature > 0
    num_unlisted = width - vocab_size
    return vllm.SamplingParams(
        max_tokens=max(1, params.max_new_tokens),
        temperature=params.temperature,
        # Greedy ignores the filters, but vLLM's own check of greedy requests does not know top_k 0.
        top_k=params.top_k if is_sampled else 0,
        top_p=params.top_p if is_sampled else 1.0,
        min_p=params.min_p if is_sampled else 0.0,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias) or None,
        min_tokens=min(params.min_new_tokens, max(1, params.max_new_tokens)),
        stop_token_ids=sorted(stop_ids),
        ignore_eos=True,
        # Without a seed vLLM would draw from one generator that starts the same way in every process.
        seed=_seed(params) if is_sampled else None,
        allowed_token_ids=None if width == vocab_size else list(range(vocab_size)),
        logprobs=_num_logprobs(params.logprobs, num_unlisted, is_full=params.full_logprobs),
        prompt_logprobs=None
        if params.prompt_logprobs is None
        else _num_logprobs(params.prompt_logprobs, num_unlisted, is_full=params.full_logprobs),
        structured_outputs=_structured_outputs(params.grammar),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _structured_outputs(grammar: Grammar | None) -> Any:
    if grammar is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    value = json.loads(grammar.source) if grammar.kind == "choice" else grammar.source
    return StructuredOutputsParams(**{grammar.kind: value})


def _seed(params: SamplingParams) -> int:
    return secrets.randbits(63) if params.seed is None else params.seed % 2**63


def _num_logprobs(wanted: int | None, num_unlisted: int, *, is_full: bool) -> int | None:
    """So many that ``wanted`` are left when those without a piece are taken out."""
    return WHOLE_VOCABULARY if is_full else wanted + num_unlisted if wanted else wanted


def position_logprobs(
    entries: Mapping[int, Any], token_id: int, *, vocab_size: int, num_top: int, is_full: bool
) -> PositionLogprobs:
    """One position of vLLM's log-probabilities: a mapping from token id to an object with ``logprob``."""
    chosen = TokenLogprob(token_id, float(entries[token_id].logprob))
    top: tuple[TokenLogprob, ...] = ()
    if num_top:
        listed = [item for item in entries.items() if item[0] < vocab_size]
        ranked = sorted(listed, key=lambda item: -item[1].logprob)[:num_top]
        top = tuple(TokenLogprob(other, float(entry.logprob)) for other, entry in ranked)
    full = [float(entries[i].logprob) for i in range(vocab_size)] if is_full else None
    return PositionLogprobs(chosen, top, full)


def prompt_positions(entries: Any, prompt_ids: list[int], params: SamplingParams, vocab_size: int) -> Any:
    """Log-probabilities of the prompt's tokens after the first, or None where none were asked for."""
    if params.prompt_logprobs is None:
        return None
    assert entries is not None, "vLLM left prompt_logprobs out"
    return tuple(
        position_logprobs(
            entries[place],
            prompt_ids[place],
            vocab_size=vocab_size,
            num_top=params.prompt_logprobs,
            is_full=params.full_logprobs,
        )
        for place in range(1 + params.prompt_logprobs_from, len(prompt_ids))
    )
