"""Answers by our own engine, from the very modules that train: no second copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.engine import ModelInfo, SamplingParams, SamplingRequest
from nemotron4.inference.engine import Engine
from nemotron4.inference.load import describe
from nemotron4.inference.runner import ModelRunner
from nemotron4.model.adapters import PromptEmbedding
from nemotron4.model.kv_cache import KVCache
from nemotron4.model.transformer import Transformer
from nemotron4.text.tokenizer import Tokenizer
from nemotron4.training.rollouts import Continuation, Draw

MAX_RUNNING = 128
MAX_STEP_TOKENS = 2048


@dataclass(frozen=True)
class EngineGenerate:
    """See ``training.rollouts.Generate``. Each call has an engine of its own, whose cache ends with it:

    what it remembers of a prompt belongs to weights that the next update changes.
    """

    base: Checkpoint
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    drops_newline: bool

    @classmethod
    def of(cls, base: Checkpoint) -> EngineGenerate:
        tokenizer, prompt_format = base.tokenizer(), base.prompt_format()
        stops = set(base.eos_token_ids)
        if prompt_format is not None:
            stops |= prompt_format.stop_token_ids(tokenizer)
        elif tokenizer.eos_id is not None:
            stops.add(tokenizer.eos_id)
        return cls(
            base, tokenizer, frozenset(stops), prompt_format is not None and prompt_format.drops_newline
        )

    def __call__(
        self,
        net: Transformer,
        draws: Sequence[Draw],
        *,
        max_new_tokens: int,
        temperature: float,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Continuation]:
        if not draws:
            return []
        longest = max(len(draw.prompt_ids) for draw in draws) + max_new_tokens
        num_running = min(len(draws), MAX_RUNNING)
        weight = net.lm_head.weight
        embedding = net.model.embed_tokens
        # The trainer's prompts begin with them (P-tuning); the engine puts them there itself.
        num_virtual = embedding.num_virtual_tokens if isinstance(embedding, PromptEmbedding) else 0
        cache = KVCache(
            net.config,
            num_running * -(-longest // KVCache.block_size),
            dtype=weight.dtype,
            device=weight.device,
        )
        shared = SamplingParams(
            max_new_tokens=max_new_tokens, temperature=temperature, stop_token_ids=self.stop_ids, logprobs=0
        )
        with Engine(
            ModelRunner(net, cache),
            self._info(net),
            self.tokenizer,
            None,
            max_running=num_running,
            max_waiting=len(draws),
            max_step_tokens=MAX_STEP_TOKENS,
            num_virtual_tokens=num_virtual,
        ) as engine:
            requests = [
                SamplingRequest(
                    draw.prompt_ids[num_virtual:], replace(shared, seed=draw.seed), self.drops_newline
                )
                for draw in draws
            ]
            found = engine.generate_each(requests, on_progress=on_progress)
        return [Continuation(g.token_ids, g.text, g.finish_reason == "stop", g.logprobs or ()) for g in found]

    def _info(self, net: Transformer) -> ModelInfo:
        """What the checkpoint tells, with the shape that trains: a fresh model borrows only its tokenizer."""
        weight = net.lm_head.weight
        return replace(
            describe(self.base, weight.dtype, weight.device),
            context_length=net.config.context_length,
            vocab_size=net.config.vocab_size,
        )
