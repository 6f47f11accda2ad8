"""What is asked of a model for one item, and its answer: the runner's unit of work, for models and judges.

A request that does not fit the context is made again with as many new tokens as the context leaves.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol, TypeVar

from nemotron4.client import ChatModel, Reply, Sampling, call_with_retries
from nemotron4.client.interface import HopelessError, TransientError
from nemotron4.evaluation.failures import judgment_name
from nemotron4.evaluation.task import Item, JudgeRequest
from nemotron4.records import JsonObject, Message

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ItemRequest:
    """User turns to be answered in order; or a raw text; or choices to weigh, or answers to reward."""

    id: str
    messages: tuple[Message, ...]
    sampling: Sampling
    follow_ups: tuple[str, ...] = ()
    is_raw: bool = False
    choices: tuple[tuple[str, str], ...] = ()  # prompt and continuation
    rewarded: tuple[str, ...] = ()
    is_usable: Callable[[str], bool] | None = None
    retry: str | None = None
    epoch: int = 1
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ItemAnswer:
    """The model's texts, one per turn (or one JSON list of numbers), and what they cost."""

    id: str
    texts: tuple[str, ...]
    messages: tuple[Message, ...] = ()  # the whole conversation, for its reader
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    duration_s: float = 0.0
    finish_reasons: tuple[str, ...] = ()  # one per text of a model; none for numbers
    thoughts: tuple[str, ...] = ()  # what a reasoning model wrote before its answers; never scored
    clipped_to: int | None = None  # new tokens, where the context left fewer than were asked for
    first_token: Mapping[str, float] | None = None  # log-probabilities of the first token's candidates

    def to_json(self) -> JsonObject:
        reasons = self.finish_reasons
        row = {
            "id": self.id,
            "response": self.texts[0] if len(self.texts) == 1 else list(self.texts),
            "finish_reason": (reasons[0] if len(reasons) == 1 else list(reasons)) or None,
            "thoughts": list(self.thoughts) or None,
            "clipped_to": self.clipped_to,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "duration_s": round(self.duration_s, 4),
            "first_token": None if self.first_token is None else dict(self.first_token),
        }
        optional = ("finish_reason", "thoughts", "clipped_to", "first_token")
        return {name: value for name, value in row.items() if value is not None or name not in optional}


def of_item(item: Item, sampling: Sampling) -> ItemRequest:
    return ItemRequest(
        id=item.id,
        messages=item.messages,
        sampling=sampling,
        follow_ups=item.follow_ups,
        is_raw=item.is_raw,
        choices=tuple(item.fields.get("choices", ())),
        rewarded=(item.fields["chosen"], item.fields["rejected"]) if "rejected" in item.fields else (),
    )


def of_judgment(request: JudgeRequest) -> ItemRequest:
    return ItemRequest(
        id=judgment_name(request.id, request.part),
        messages=request.messages,
        sampling=request.sampling,
        is_usable=request.is_usable,
        retry=request.retry,
        fields={"item": request.id, "part": request.part, **request.fields},
    )


class Call(Protocol):
    """Makes one request, and makes it again while it fails for now."""

    async def __call__(self, request: Callable[[], Awaitable[Result]], /) -> Result: ...


async def hold(
    conversation: ItemRequest, chat: ChatModel, on_retry: Callable[[TransientError], None]
) -> ItemAnswer:
    """Ask everything, one request after the other; a request that fails for now is told and repeated."""
    started_s = time.monotonic()
    call = partial(call_with_retries, on_retry=on_retry)
    if conversation.choices:
        return _of_numbers(conversation, await _weigh(conversation, chat, call), started_s)
    if conversation.rewarded:
        return _of_numbers(conversation, await _reward(conversation, chat, call), started_s)
    messages = list(conversation.messages)
    asking = _Asking(chat, conversation, call)
    if conversation.is_raw:
        replies = [await asking.ask(messages)]
        messages.append(Message("assistant", replies[0].text))
    else:
        replies = await _talk(conversation, asking, messages)
    texts = tuple(reply.text for reply in replies)
    if conversation.is_usable is not None:
        texts = ("\n".join(texts),)  # a judge's two attempts are one judgment
    return ItemAnswer(
        id=conversation.id,
        texts=texts,
        messages=tuple(messages),
        prompt_tokens=_total([reply.prompt_tokens for reply in replies]),
        completion_tokens=_total([reply.completion_tokens for reply in replies]),
        duration_s=time.monotonic() - started_s,
        finish_reasons=tuple(reply.finish_reason for reply in replies)[: len(texts)],
        thoughts=tuple(reply.thoughts for reply in replies if reply.thoughts),
        clipped_to=asking.clipped_to,
        first_token=_first_token(replies[0], conversation),
    )


@dataclass
class _Asking:
    """One request after the other, each with the new tokens that the context leaves."""

    chat: ChatModel
    conversation: ItemRequest
    call: Call
    clipped_to: int | None = None

    async def ask(self, messages: Sequence[Message]) -> Reply:
        sampling = self.conversation.sampling
        while True:
            try:
                return await self.call(partial(self._request, tuple(messages), sampling))
            except HopelessError as error:
                room = room_left(error, sampling.max_tokens)
                if room is None:
                    raise
                sampling = replace(sampling, max_tokens=room)
                self.clipped_to = min(room, self.clipped_to or room)

    async def _request(self, messages: tuple[Message, ...], sampling: Sampling) -> Reply:
        if self.conversation.is_raw:
            return await self.chat.complete(messages[0].content, sampling)
        return await self.chat.chat(messages, sampling)


_CONTEXT = re.compile(
    r"(?:context|model)(?:'s)?(?: length| size| window)?[^0-9]{0,24}?(?:is|of|:)? ?(\d+)", re.I
)
_PROMPT = re.compile(
    r"(\d+)(?: tokens)? (?:in the (?:messages|prompt|input)|prompt tokens|input tokens)"
    r"|(?:prompt|input|messages)[^0-9.]{0,24}?(\d+) (?:input )?tokens",
    re.I,
)


def room_left(error: HopelessError, asked: int) -> int | None:
    """New tokens that fit, after a refusal for ``asked``; None if the request was refused for something else.

    Our server, vLLM and OpenAI name context and prompt. Without the numbers, half of what was asked for is
    tried; a prompt that leaves no room for one token does not fit.
    """
    if error.kind != "context_length" or asked <= 1:
        return None
    context, prompt = _CONTEXT.search(error.message), _PROMPT.search(error.message)
    if context and prompt:
        room = int(context[1]) - int(prompt[1] or prompt[2])
        if 0 < room < asked:
            return room
        if room <= 0:
            return None
    return asked // 2


def _of_numbers(conversation: ItemRequest, numbers: list[float], started_s: float) -> ItemAnswer:
    text = json.dumps(numbers)
    messages = (*conversation.messages, Message("assistant", text))
    return ItemAnswer(
        id=conversation.id, texts=(text,), messages=messages, duration_s=time.monotonic() - started_s
    )


async def _talk(conversation: ItemRequest, asking: _Asking, messages: list[Message]) -> list[Reply]:
    """The replies in order; ``messages`` grows by every turn."""
    replies: list[Reply] = []
    follow_ups = list(conversation.follow_ups)
    while True:
        replies.append(await asking.ask(messages))
        messages.append(Message("assistant", replies[-1].text))
        if len(replies) == 1 and conversation.retry and not _is_usable(conversation, replies[0]):
            follow_ups.append(conversation.retry)
        if not follow_ups:
            return replies
        messages.append(Message("user", follow_ups.pop(0)))


def _is_usable(conversation: ItemRequest, reply: Reply) -> bool:
    return conversation.is_usable is None or conversation.is_usable(reply.text)


async def _reward(conversation: ItemRequest, chat: ChatModel, call: Call) -> list[float]:
    rewards = []
    for answer in conversation.rewarded:
        messages = (*conversation.messages, Message("assistant", answer))
        reward = await call(partial(chat.score, messages))
        if reward.scalar is None:
            raise HopelessError("the endpoint sends no scalar reward", kind="unsupported")
        rewards.append(reward.scalar)
    return rewards


async def _weigh(conversation: ItemRequest, chat: ChatModel, call: Call) -> list[float]:
    """Log-probability of each choice after the prompt, in nats.

    A server that ignores the request would give equal or missing numbers and so exact chance without an
    error; both are refused.
    """
    totals = []
    for prompt, pairs in groupby(conversation.choices, key=itemgetter(0)):
        texts = [choice for _, choice in pairs]
        for tokens in await call(partial(chat.continuation_logprobs, prompt, texts)):
            totals.append(sum(token.logprob for token in tokens))
            if not tokens or math.isnan(totals[-1]):
                raise HopelessError(
                    "the endpoint sent no log-probabilities of the choice", kind="unsupported"
                )
    if len(totals) > 1 and len(set(totals)) == 1:
        raise HopelessError("the endpoint sent equal log-probabilities for all choices", kind="unsupported")
    return totals


def _first_token(reply: Reply, conversation: ItemRequest) -> dict[str, float] | None:
    if conversation.sampling.top_logprobs is None or not reply.logprobs:
        return None
    first = reply.logprobs[0]
    return dict(first.top) or {first.token: first.logprob}


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
