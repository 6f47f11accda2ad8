"""A chat model in this process: any engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nemotron4.client.interface import (
    BadContentError,
    Embedding,
    HopelessError,
    ManyLogprobs,
    Reply,
    Sampling,
    TextLogprob,
    TransientError,
)
from nemotron4.client.thoughts import without_thoughts
from nemotron4.engine import (
    Grammar,
    InferenceEngine,
    PositionLogprobs,
    Reward,
    RewardScorer,
    SamplingParams,
    SamplingRequest,
)
from nemotron4.errors import EngineBusyError, RequestError, TemplateError, TokenizerError
from nemotron4.records import Generation, JsonObject, Message
from nemotron4.text import structured_output
from nemotron4.text.answers import (
    EMBEDDING,
    AnswerText,
    EngineStoppedError,
    chat_request,
    encode_text,
    run,
    text_request,
)


class EngineChatModel:
    """Closing it leaves the engine running: whoever made the engine closes it."""

    def __init__(self, engine: InferenceEngine, *, name: str | None = None) -> None:
        self.name: str = name or engine.info.name
        self._engine = engine

    def chat_request(self, messages: Sequence[Message], sampling: Sampling) -> JsonObject:
        params, own = _params(sampling), self._engine.prompt_format
        return {
            "model": self.name,
            "messages": [message.to_json() for message in messages],
            "max_new_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": params.seed,
            "stop_strings": (*(own.stop_strings if own else ()), *params.stop_strings),
            "stop_token_ids": sorted(self._engine.info.eos_token_ids),
            "logprobs": params.logprobs,
            **({} if sampling.schema is None else {"schema": sampling.schema}),
            **({"choice": list(sampling.choice)} if sampling.choice else {}),
        }

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        try:
            request = chat_request(self._engine, messages, _params(sampling))
        except (RequestError, TemplateError, TokenizerError) as error:
            raise _hopeless(error) from error
        return without_thoughts(self._reply(await self._run(request), sampling))

    async def complete(self, prompt: str, sampling: Sampling) -> Reply:
        request = text_request(self._engine, prompt, _params(sampling))
        return self._reply(await self._run(request), sampling)

    async def continuation_logprobs(self, prompt: str, continuations: Sequence[str]) -> ManyLogprobs:
        start_ids = encode_text(self._engine, prompt)
        rows = [encode_text(self._engine, prompt + each) for each in continuations]
        if any(ids[: len(start_ids)] != start_ids for ids in rows):
            raise BadContentError("prompt and continuation share a token", kind="token_boundary")
        if all(len(ids) == len(start_ids) + 1 for ids in rows):
            return await self._next_tokens(start_ids, [ids[-1] for ids in rows])
        return [await self._after(len(start_ids), ids) for ids in rows]

    async def _next_tokens(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> ManyLogprobs:
        """Of continuations that are one token each: one pass over the prompt has all of them."""
        params = SamplingParams(max_new_tokens=1, temperature=0.0, logprobs=0, full_logprobs=True)
        answer = await self._run(SamplingRequest(tuple(prompt_ids), params))
        _generation(answer)
        [position] = answer.logprobs
        assert position.full is not None, "the engine left full_logprobs out"
        piece = self._engine.tokenizer.piece
        return [(TextLogprob(piece(i), position.full[i]),) for i in token_ids]

    async def _after(self, num_prompt: int, ids: Sequence[int]) -> tuple[TextLogprob, ...]:
        """Entry 0 belongs to token 1. The prompt, which other continuations have, may come from the cache."""
        params = SamplingParams(max_new_tokens=0, prompt_logprobs=0, prompt_logprobs_from=num_prompt - 1)
        answer = await self._run(SamplingRequest(tuple(ids), params))
        return tuple(map(self._logprob, answer.prompt_logprobs))

    async def score(self, messages: Sequence[Message]) -> Reward:
        if not isinstance(self._engine, RewardScorer):
            raise HopelessError(
                f"{self.name} is loaded for generation, not as a reward model",
                kind="unsupported",
                hint="serve the reward model and name its URL",
            )
        try:
            ids = await asyncio.to_thread(self._engine.encode, messages)
            [reward] = await self._engine.score_async([ids])
        except (RequestError, TemplateError, TokenizerError) as error:
            raise _hopeless(error) from error
        return reward

    async def embed(self, text: str) -> Embedding:
        answer = await self._run(text_request(self._engine, text, EMBEDDING))
        return Embedding(vector=tuple(answer.embedding()), prompt_tokens=len(answer.request.prompt_ids))

    async def close(self) -> None:
        return None

    async def _run(self, request: SamplingRequest) -> AnswerText:
        try:
            return await run(self._engine, request)
        except EngineBusyError as error:
            raise TransientError(
                error.message, kind="rate_limit", retry_after_s=error.retry_after_s
            ) from error
        except RequestError as error:
            raise _hopeless(error) from error

    def _reply(self, answer: AnswerText, sampling: Sampling) -> Reply:
        generation = _generation(answer)
        return Reply(
            text=generation.text,
            finish_reason=generation.finish_reason,
            model=self.name,
            prompt_tokens=generation.num_prompt_tokens,
            completion_tokens=len(generation.token_ids),
            logprobs=None if sampling.top_logprobs is None else tuple(map(self._logprob, answer.logprobs)),
        )

    def _logprob(self, position: PositionLogprobs) -> TextLogprob:
        piece = self._engine.tokenizer.piece
        top = tuple((piece(rival.token_id), rival.logprob) for rival in position.top)
        return TextLogprob(piece(position.chosen.token_id), position.chosen.logprob, top)


def _generation(answer: AnswerText) -> Generation:
    try:
        return answer.generation()
    except EngineStoppedError as error:
        raise TransientError(error.message, kind="server_error") from error


def _grammar(sampling: Sampling) -> Grammar | None:
    if sampling.choice:
        return structured_output.choice(sampling.choice)
    return None if sampling.schema is None else structured_output.json_schema(sampling.schema)


def _params(sampling: Sampling) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop_strings=sampling.stop,
        logprobs=sampling.top_logprobs,
        grammar=_grammar(sampling),
    )


def _hopeless(error: RequestError | TemplateError | TokenizerError) -> HopelessError:
    kind = "context_length" if "context" in error.message else "bad_request"
    return HopelessError(error.message, kind=kind)  # type: ignore[arg-type]
