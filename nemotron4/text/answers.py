"""Text and messages to token ids, token steps to the text of an answer: the only place where either happens.

Server, ``chat``, ``generate``, ``nemotron4.load``, evaluation, synthesis and rollouts all go through here, so
one request has one prompt, one end and one text, whatever door it came in by.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from nemotron4.engine import (
    ChatFormat,
    FinishReason,
    InferenceEngine,
    PositionLogprobs,
    SamplingParams,
    SamplingRequest,
    Tokenizer,
    TokenStep,
    derive_seed,
)
from nemotron4.errors import Nemotron4Error, RequestError, TemplateError
from nemotron4.records import Generation, Message
from nemotron4.text.messages import with_calls_as_text, with_one_system_message
from nemotron4.text.tokenizer import TextStream

if TYPE_CHECKING:
    from nemotron4.text.structured_output import Follower


# What asks for the embedding of a prompt.
EMBEDDING = SamplingParams(max_new_tokens=0, hidden_mean=True)


class EngineStoppedError(Nemotron4Error):
    """The engine ended a request by itself: the request is not to blame."""


# -- in: text, token ids or messages to a request ----------------------------------------------------------


def encode_text(engine: InferenceEngine, text: str) -> list[int]:
    """Raw text, markers included; BOS is first where the model expects it and the text does not spell it."""
    ids, bos_id = engine.tokenizer.encode(text), engine.tokenizer.bos_id
    needs_bos = engine.info.adds_bos and bos_id is not None and ids[:1] != [bos_id]
    return [cast("int", bos_id), *ids] if needs_bos else ids


def text_request(
    engine: InferenceEngine, prompt: str | Sequence[int], params: SamplingParams
) -> SamplingRequest:
    """Continue raw text, or token ids as they are, until an id that ends a text."""
    ids = encode_text(engine, prompt) if isinstance(prompt, str) else prompt
    outside = next((i for i in ids if not 0 <= i < engine.info.vocab_size), None)
    if outside is not None:
        raise RequestError(
            f"the prompt holds token id {outside}, which is outside the vocabulary",
            hint=f"use ids from 0 to {engine.info.vocab_size - 1}",
        )
    params = _drawable(engine, params)
    return SamplingRequest(tuple(ids), params if params.ignore_eos else _ending_at(params, end_ids(engine)))


def chat_request(
    engine: InferenceEngine,
    messages: Sequence[Message],
    params: SamplingParams,
    *,
    own: ChatFormat | None = None,
    continues_last: bool = False,
    add_generation_prompt: bool = True,
) -> SamplingRequest:
    """Answer a conversation in the model's own format; markers inside messages are only text.

    With ``continues_last`` the last message, an assistant's, is the beginning of the answer. The answer ends
    with the text or the turn: at ids where the format's stop string is one marker, else at the string.
    ``own`` is the model's format with tools.
    """
    own = own or chat_format(engine)
    prompt_ids = encode_chat(
        engine,
        messages,
        own=own,
        continues_last=continues_last,
        add_generation_prompt=add_generation_prompt,
    )
    return turn_request(engine, own, tuple(prompt_ids), params)


def encode_chat(
    engine: InferenceEngine,
    messages: Sequence[Message],
    *,
    own: ChatFormat | None = None,
    continues_last: bool = False,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The prompt of a conversation. A format that has room for one system message gets several as one."""
    own = own or chat_format(engine)
    prefill, messages = "", with_calls_as_text(messages, own)
    if continues_last:
        if not messages or messages[-1].role != "assistant":
            raise TemplateError("there is no answer to continue", hint="end with an assistant's message")
        prefill, messages = messages[-1].content, messages[:-1]
    encode = partial(
        own.encode,
        engine.tokenizer,
        add_generation_prompt=add_generation_prompt or continues_last,
        prefill=prefill,
    )
    try:
        return encode(messages)
    except TemplateError:
        joined = with_one_system_message(messages)
        if len(joined) == len(messages):
            raise
        return encode(joined)


def turn_request(
    engine: InferenceEngine, own: ChatFormat, prompt_ids: tuple[int, ...], params: SamplingParams
) -> SamplingRequest:
    """The same for a conversation whose ids are known."""
    params = _drawable(engine, params)
    if params.ignore_eos:
        return SamplingRequest(prompt_ids, params, drops_newline=own.drops_newline)
    if params.grammar is not None and not params.grammar.has_text:
        # The grammar ends the text; what ends a turn elsewhere may be part of a string here.
        ends = end_ids(engine) | _known(engine, own.stop_token_ids(engine.tokenizer))
        return SamplingRequest(prompt_ids, _ending_at(params, ends))
    spelled = tuple(stop for stop in own.stop_strings if stop not in engine.tokenizer.markers)
    ends = end_ids(engine) | _known(engine, own.stop_token_ids(engine.tokenizer))
    params = replace(_ending_at(params, ends), stop_strings=(*params.stop_strings, *spelled))
    return SamplingRequest(prompt_ids, params, drops_newline=own.drops_newline)


def samples(request: SamplingRequest, n: int) -> list[SamplingRequest]:
    """``n`` samples of one request, each with its own seed."""
    seed = request.params.seed
    return [replace(request, params=replace(request.params, seed=derive_seed(seed, i))) for i in range(n)]


def end_ids(engine: InferenceEngine) -> frozenset[int]:
    """The ids after which the model has said all."""
    own = engine.tokenizer.eos_id
    return _known(engine, (*engine.info.eos_token_ids, *(() if own is None else (own,))))


def chat_format(engine: InferenceEngine) -> ChatFormat:
    """The model's own format, or TemplateError: only messages need one."""
    if engine.prompt_format is None:
        raise TemplateError(
            f"the model {engine.info.name!r} has no chat template, so messages cannot be written",
            hint="give the whole prompt as text",
        )
    return engine.prompt_format


def _known(engine: InferenceEngine, ids: Iterable[int]) -> frozenset[int]:
    return frozenset(token_id for token_id in ids if 0 <= token_id < engine.info.vocab_size)


def _drawable(engine: InferenceEngine, params: SamplingParams) -> SamplingParams:
    """Without stop ids that no token has: they end nothing, and a mask has no place for them."""
    if not params.stop_token_ids:
        return params
    return replace(params, stop_token_ids=_known(engine, params.stop_token_ids))


def _ending_at(params: SamplingParams, ids: frozenset[int]) -> SamplingParams:
    stop_ids = ids.union(params.stop_token_ids)
    return replace(params, stop_token_ids=stop_ids, min_tokens_masks=stop_ids.union(params.min_tokens_masks))


# -- when an answer ends ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stop:
    reason: FinishReason
    matched: int | str | None = None  # the stop token or the stop string


class StopCheck:
    """Follows one request's new tokens and says when it ends; decodes text only to find stop strings."""

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        grammar: Follower | None = None,
    ) -> None:
        self._params = params
        self._grammar = grammar
        self._longest = max((len(s) for s in params.stop_strings), default=0)
        self._stream = TextStream(tokenizer, prompt_ids) if params.stop_strings else None
        self._tail = ""
        if params.stop_strings and params.stop_scope == "row_suffix":
            # A stop string may begin in the prompt.
            self._tail = tokenizer.decode(prompt_ids)[-self._longest :]

    def after(self, token_id: int, num_new: int) -> Stop | None:
        """The stop that the newest token causes, if any."""
        if token_id in self._params.stop_token_ids:
            return Stop("stop", token_id)
        if self._stream is not None:
            matched = self._match(self._stream.push(token_id))
            # NeMo's end strings do not wait for the minimum, only its end of text does.
            is_early = self._params.stop_scope == "new_text" and num_new < self._params.min_new_tokens
            if matched is not None and not is_early:
                return Stop("stop", matched)
        if self._grammar is not None:
            self._grammar.consume(token_id)
            if self._grammar.is_complete:
                return Stop("stop")
        return Stop("length") if num_new >= self._params.max_new_tokens else None

    def _match(self, piece: str) -> str | None:
        if self._params.stop_scope == "row_suffix":
            self._tail = (self._tail + piece)[-max(self._longest, 1) :]
            return next((s for s in self._params.stop_strings if self._tail.endswith(s)), None)
        window = self._tail + piece
        self._tail = window[max(0, len(window) - self._longest + 1) :]
        found = [(window.find(s), s) for s in self._params.stop_strings if s in window]
        return min(found)[1] if found else None


# -- out: token steps to an answer -------------------------------------------------------------------------


class AnswerText:
    """One answer as its tokens come: no half character, no stop string, not even its start.

    ``push`` returns the text that may be shown now; ``text`` is all that was shown.
    """

    def __init__(self, tokenizer: Tokenizer, request: SamplingRequest) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.prompt_logprobs: tuple[PositionLogprobs, ...] = ()
        self.finish_reason: FinishReason | None = None
        self.starts: list[int] = []  # where the text of each token begins
        self.num_cached = 0
        self._hidden_mean: tuple[float, ...] = ()
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, request.prompt_ids)
        self._stop_strings = tuple(stop for stop in request.params.stop_strings if stop)
        self._raw = ""
        self._num_sent = 0
        self._least_end = 0  # no stop string ends before: the minimum of new tokens was not reached

    @property
    def text(self) -> str:
        return self._raw[: self._num_sent]

    def push(self, step: TokenStep) -> str:
        if step.prompt_logprobs is not None:
            self.prompt_logprobs = step.prompt_logprobs
        self.num_cached += step.num_cached
        self._hidden_mean = step.hidden_mean or ()
        if step.logprobs is not None:
            self.logprobs.append(step.logprobs)
        if step.token_id is not None:
            self.token_ids.append(step.token_id)
            self.starts.append(len(self._raw))
            # A stop token ends the answer and is no part of it.
            if self.request.params.shows_stop or not isinstance(step.stop_reason, int):
                self._raw += self._piece(step.token_id)
            if len(self.token_ids) < self.request.params.min_new_tokens:
                self._least_end = len(self._raw) + 1
        if step.finish_reason is None:
            return self._send(len(self._raw) - self._num_undecided())
        self.finish_reason = step.finish_reason
        self._raw += self._stream.finish()
        return self._send(self._end(step))

    def _piece(self, token_id: int) -> str:
        if self.request.params.shows_special:
            return _shown(self._tokenizer, self._stream, token_id)
        return self._stream.push(token_id)

    def generation(self) -> Generation:
        """The whole answer; EngineStoppedError if the engine ended it before its time."""
        if self.finish_reason is None or self.finish_reason == "abort":
            raise EngineStoppedError("the engine stopped before the answer was complete")
        return Generation(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self.request.prompt_ids),
            logprobs=tuple(position.chosen.logprob for position in self.logprobs)
            if self.request.params.logprobs is not None
            else None,
        )

    def embedding(self) -> list[float]:
        """The mean of the prompt's last hidden states, of length 1."""
        if not self._hidden_mean:
            raise EngineStoppedError("the engine stopped before the embedding was complete")
        length = math.hypot(*self._hidden_mean) or 1.0
        return [value / length for value in self._hidden_mean]

    def _end(self, step: TokenStep) -> int:
        """Where the answer ends in the raw text, now that no token follows."""
        end = len(self._raw)
        if step.finish_reason != "stop":
            return end
        if isinstance(step.stop_reason, str):
            found = [
                self._raw.find(stop, max(self._num_sent, self._least_end - len(stop)))
                for stop in self._stop_strings
            ]
            places = [(at, len(stop)) for at, stop in zip(found, self._stop_strings, strict=True) if at >= 0]
            at, length = min(places, default=(end, 0))
            end = at + length if self.request.params.shows_stop else at
        if self.request.drops_newline and self._raw.endswith("\n", self._num_sent, end):
            end -= 1
        return end

    def _num_undecided(self) -> int:
        """Length of the end of the text that may turn out to be the start of a stop string."""
        newline = self.request.drops_newline
        longest = max(map(len, self._stop_strings), default=1) - 1
        for length in range(min(longest, len(self._raw) - self._num_sent), 0, -1):
            ending = self._raw[-length:]
            if any(stop.startswith(ending) for stop in self._stop_strings):
                return length + (newline and self._raw.endswith("\n", 0, len(self._raw) - length))
        return 1 if newline and self._raw.endswith("\n") else 0

    def _send(self, end: int) -> str:
        end = max(end, self._num_sent)
        sent = self._raw[self._num_sent : end]
        self._num_sent = end
        return sent


def finished(tokenizer: Tokenizer, request: SamplingRequest, steps: Iterable[TokenStep]) -> Generation:
    """The answer of a request that has run to its end."""
    answer = AnswerText(tokenizer, request)
    for step in steps:
        answer.push(step)
    return answer.generation()


async def run(
    engine: InferenceEngine, request: SamplingRequest, *, on_text: Callable[[str], None] = lambda _: None
) -> AnswerText:
    """One request to its end. ``on_text`` is called with what each token completes, '' included."""
    answer = AnswerText(engine.tokenizer, request)
    stream = cast("AsyncGenerator[TokenStep]", engine.stream(request.prompt_ids, request.params))
    async with aclosing(stream):
        async for step in stream:
            on_text(answer.push(step))
    return answer


def continuation(tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Iterable[int]) -> str:
    """The text of ids behind a prompt, stop tokens included."""
    stream = TextStream(tokenizer, prompt_ids)
    return "".join([*map(stream.push, new_ids), stream.finish()])


def text_with_markers(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of ids, control pieces by name."""
    stream = TextStream(tokenizer)
    return "".join([*(_shown(tokenizer, stream, token_id) for token_id in ids), stream.finish()])


def _shown(tokenizer: Tokenizer, stream: TextStream, token_id: int) -> str:
    if tokenizer.is_control(token_id):
        return stream.finish() + tokenizer.piece(token_id)
    return stream.push(token_id)
