"""``Engine``: prompts in, generations out. What ``nemotron4.load`` returns."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, cast

from nemotron4.errors import RequestError
from nemotron4.inference.core import EngineCore
from nemotron4.inference.interface import SamplingParams, TokenStep
from nemotron4.inference.stopping import cut_at
from nemotron4.records import Generation, Message
from nemotron4.text.tokenizer import TextStream

# A text, its token ids, or a conversation (rendered in the model's own format).
Prompt = str | Sequence[int] | Sequence[Message] | Sequence[Mapping[str, str]]


class Engine(EngineCore):
    """A loaded model, for any thread and, through ``stream``, for asyncio. Close it or use ``with``."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        n: int = 1,
        logprobs: int | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """Generate ``n`` texts for each prompt; temperature 0 is greedy.

        The result has the prompts' order, the ``n`` samples of one prompt side by side. Text ends before the
        stop string or stop token; ``token_ids`` contain it. ``sampling`` takes the other fields of
        SamplingParams. Equal seed and prompt give equal tokens whatever else runs; without a seed each sample
        draws its own.
        """
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop_strings=tuple(stop),
            logprobs=logprobs,
            stop_token_ids=frozenset(sampling.pop("stop_token_ids", self.info.eos_token_ids)),
            **sampling,
        )
        jobs = [
            (prompt_ids, replace(params, seed=derive_seed(seed, i)))
            for prompt_ids in map(self.encode, prompts)
            for i in range(n)
        ]
        return self.generate_each(jobs)

    def generate_each(
        self,
        jobs: Sequence[tuple[Sequence[int], SamplingParams]],
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Generation]:
        """One generation for each pair of token ids and settings, in order; see ``collect``."""
        results = self.collect(jobs, on_progress=on_progress)
        return [self._generation(ids, steps) for (ids, _), steps in zip(jobs, results, strict=True)]

    async def generate_async(self, prompts: Sequence[Prompt], **settings: Any) -> list[Generation]:
        """``generate`` without blocking the event loop."""
        return await asyncio.to_thread(self.generate, prompts, **settings)

    def score(
        self, texts: Sequence[str] | None = None, *, token_ids: Sequence[Sequence[int]] | None = None
    ) -> list[list[float]]:
        """Log-probability (nats) of each token after the first, of each text or row of ids."""
        if (texts is None) == (token_ids is None):
            raise RequestError("score() takes either texts or token_ids")
        rows = [self.encode(text) for text in texts] if texts is not None else list(token_ids or ())
        params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
        results = self.collect([(row, params) for row in rows])
        return [[p.chosen.logprob for p in steps[0].prompt_logprobs or ()] for steps in results]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Text is taken as it is, markers included; messages are rendered."""
        if isinstance(prompt, str):
            bos = [self.tokenizer.bos_id] if self.info.adds_bos and self.tokenizer.bos_id is not None else []
            return bos + self.tokenizer.encode(prompt)
        if not prompt or isinstance(prompt[0], int):
            return list(cast("Sequence[int]", prompt))
        if self.prompt_format is None:
            raise RequestError(
                f"{self.info.name} has no chat template, so messages cannot be rendered",
                hint="give the prompt as text",
            )
        messages = [m if isinstance(m, Message) else Message.parse(m, "message") for m in prompt]
        token_ids: list[int] = self.prompt_format.encode(self.tokenizer, messages)
        return token_ids

    def _generation(self, prompt_ids: Sequence[int], steps: Sequence[TokenStep]) -> Generation:
        last = steps[-1]
        token_ids = [step.token_id for step in steps if step.token_id is not None]
        shown = token_ids[:-1] if isinstance(last.stop_reason, int) else token_ids
        stream = TextStream(self.tokenizer, prompt_ids)
        # A model may be wider than its vocabulary; what it draws from there has no text.
        with_text = (token_id for token_id in shown if token_id < self.tokenizer.vocab_size)
        text = "".join([*map(stream.push, with_text), stream.finish()])
        if isinstance(last.stop_reason, str):
            text = cut_at(text, last.stop_reason)
        scores = [step.logprobs.chosen.logprob for step in steps if step.logprobs is not None]
        assert last.finish_reason is not None
        return Generation(
            text=text,
            token_ids=tuple(token_ids),
            finish_reason=last.finish_reason,
            num_prompt_tokens=len(prompt_ids),
            logprobs=tuple(scores) if scores else None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def derive_seed(seed: int | None, index: int) -> int | None:
    """The seed of the ``index``-th sample of a request; the first keeps the request's own."""
    if seed is None or index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
