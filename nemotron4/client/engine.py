"""A chat model in this process: any engine with the interface of ``nemotron4.inference.interface``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from nemotron4.client.interface import (
    BadContentError,
    HopelessError,
    Reply,
    Reward,
    Sampling,
    TokenLogprob,
    TransientError,
)
from nemotron4.errors import EngineBusyError, RequestError
from nemotron4.records import JsonObject, Message


class Engine(Protocol):
    """The part of ``InferenceEngine`` that is used here."""

    @property
    def info(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    def stream(self, prompt_ids: Sequence[int], params: Any) -> AsyncIterator[Any]: ...


class EngineChatModel:
    """Closing it leaves the engine running: whoever made the engine closes it.

    make_params: the engine's ``SamplingParams`` class. encode_chat: messages to prompt ids, markers that
    stand in a message spelled out. stop: stop strings of the template.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        make_params: Callable[..., Any],
        encode_chat: Callable[[Sequence[Message]], Sequence[int]],
        stop: Sequence[str] = (),
        name: str | None = None,
    ) -> None:
        self.name: str = name or str(engine.info.name)
        self._engine = engine
        self._make_params = make_params
        self._encode_chat = encode_chat
        self._stop = tuple(stop)

    def chat_request(self, messages: Sequence[Message], sampling: Sampling) -> JsonObject:
        values = self._values(sampling)
        values["stop_token_ids"] = sorted(values["stop_token_ids"])
        return {"model": self.name, "messages": [message.to_json() for message in messages], **values}

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        return await self._generate(self._encode_chat(messages), sampling)

    async def complete(self, prompt: str, sampling: Sampling) -> Reply:
        return await self._generate(self._engine.tokenizer.encode(prompt), sampling)

    async def _generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Reply:
        tokenizer = self._engine.tokenizer
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        last: Any = None
        async for last in self._stream(prompt_ids, self._make_params(**self._values(sampling))):
            if last.token_id is not None:
                ids.append(last.token_id)
                if last.logprobs is not None:
                    logprobs.append(self._logprob(last.logprobs))
        if last is None or last.finish_reason is None:
            raise BadContentError("the engine's stream ended without a finish reason", kind="engine")
        if last.finish_reason == "abort":
            raise TransientError("the engine aborted the request", kind="server_error")
        shown = ids[:-1] if isinstance(last.stop_reason, int) else ids
        text = str(tokenizer.decode(shown))
        if isinstance(last.stop_reason, str) and last.stop_reason:
            text = text.partition(last.stop_reason)[0]
        return Reply(
            text=text,
            finish_reason=last.finish_reason,
            model=self.name,
            prompt_tokens=len(prompt_ids),
            completion_tokens=len(ids),
            logprobs=tuple(logprobs) if sampling.top_logprobs is not None else None,
        )

    async def continuation_logprobs(self, prompt: str, continuation: str) -> tuple[TokenLogprob, ...]:
        start_ids = self._engine.tokenizer.encode(prompt)
        ids = self._engine.tokenizer.encode(prompt + continuation)
        if ids[: len(start_ids)] != start_ids:
            raise BadContentError("prompt and continuation share a token", kind="token_boundary")
        params = self._make_params(max_new_tokens=0, temperature=0.0, prompt_logprobs=0)
        async for step in self._stream(ids, params):
            if step.prompt_logprobs is not None:
                # Entry 0 belongs to token 1.
                return tuple(self._logprob(entry) for entry in step.prompt_logprobs[len(start_ids) - 1 :])
        raise BadContentError("the engine sent no log-probabilities of the prompt", kind="engine")

    async def score(self, messages: Sequence[Message]) -> Reward:
        raise HopelessError(
            f"{self.name} is loaded for generation, not as a reward model",
            kind="unsupported",
            hint="serve the reward model and name its URL",
        )

    async def close(self) -> None:
        return None

    async def _stream(self, prompt_ids: Sequence[int], params: Any) -> AsyncIterator[Any]:
        try:
            async for step in self._engine.stream(prompt_ids, params):
                yield step
        except EngineBusyError as error:
            raise TransientError(
                error.message, kind="rate_limit", retry_after_s=error.retry_after_s
            ) from error
        except RequestError as error:
            kind = "context_length" if "context" in error.message else "bad_request"
            raise HopelessError(error.message, kind=kind) from error  # type: ignore[arg-type]

    def _values(self, sampling: Sampling) -> JsonObject:
        return {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": sampling.seed,
            "stop_strings": (*self._stop, *sampling.stop),
            "stop_token_ids": frozenset(self._engine.info.eos_token_ids),
            "logprobs": sampling.top_logprobs,
        }

    def _logprob(self, position: Any) -> TokenLogprob:
        piece = self._engine.tokenizer.piece
        top = tuple((str(piece(rival.token_id)), float(rival.logprob)) for rival in position.top)
        return TokenLogprob(str(piece(position.chosen.token_id)), float(position.chosen.logprob), top)
