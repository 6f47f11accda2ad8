"""Answers by our own engine from the very modules that train: no second copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.engine import ModelInfo, SamplingRequest
from nemotron4.inference.engine import Engine
from nemotron4.inference.load import describe
from nemotron4.inference.torch_runner import ModelRunner
from nemotron4.model.adapters import PromptEmbedding
from nemotron4.model.kv_cache import KVCache
from nemotron4.model.transformer import Transformer
from nemotron4.records import Generation
from nemotron4.text.answers import text_request, turn_request

MAX_RUNNING = 128
MAX_STEP_TOKENS = 2048


class RolloutEngine:
    """Vocabulary and format of ``base``, weights of each call.

    Each call has an engine of its own, whose cache ends with it: what it remembers of a prompt belongs to
    weights that the next update changes.
    """

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._tokenizer, self._format = base.tokenizer(), base.prompt_format()

    def __call__(
        self,
        net: Transformer,
        requests: Sequence[SamplingRequest],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """One answer for each request, in order, by the weights that ``net`` has now.

        What ends an answer is the model's own. ``on_progress`` is called now and then with how many are
        finished and how many tokens there are.
        """
        if not requests:
            return []
        longest = max(len(each.prompt_ids) + each.params.max_new_tokens for each in requests)
        num_running = min(len(requests), MAX_RUNNING)
        weight = net.lm_head.weight
        embedding = net.model.embed_tokens
        # The trainer's prompts begin with them (P-tuning); the engine puts them there itself.
        num_virtual = embedding.num_virtual_tokens if isinstance(embedding, PromptEmbedding) else 0
        num_blocks = num_running * -(-longest // KVCache.block_size)
        cache = KVCache(net.config, num_blocks, dtype=weight.dtype, device=weight.device)
        own = self._format
        with Engine(
            ModelRunner(net, cache),
            self._info(net),
            self._tokenizer,
            own,
            max_running=num_running,
            max_waiting=len(requests),
            max_step_tokens=MAX_STEP_TOKENS,
            num_virtual_tokens=num_virtual,
        ) as engine:
            ready = []
            for each in requests:
                ids = each.prompt_ids[num_virtual:]
                ready.append(
                    turn_request(engine, own, ids, each.params)
                    if own
                    else text_request(engine, ids, each.params)
                )
            return engine.generate_each(ready, on_progress=on_progress)

    def _info(self, net: Transformer) -> ModelInfo:
        """What the checkpoint tells, with the shape that trains: a fresh model borrows only its tokenizer."""
        weight = net.lm_head.weight
        return replace(
            describe(self._base, weight.dtype, weight.device),
            context_length=net.config.context_length,
            vocab_size=net.config.vocab_size,
        )
