"""What is asked of a model for one item, and its answer: the runner's unit of work, for models and judges."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from nemotron4.client import ChatModel, Reply, Sampling, call_with_retries
from nemotron4.client.interface import HopelessError, TransientError
from nemotron4.evaluation.task import Item, JudgeRequest
from nemotron4.records import JsonObject, Message

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Conversation:
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
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The model's texts, one per turn (or one JSON list of numbers), and what they cost."""

    id: str
    texts: tuple[str, ...]
    messages: tuple[Message, ...] = ()  # the whole conversation, for its reader
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    duration_s: float = 0.0
    first_token: Mapping[str, float] | None = None  # log-probabilities of the first token's candidates

    def to_json(self) -> JsonObject:
        return {
            "id": self.id,
            "response": self.texts[0] if len(self.texts) == 1 else list(self.texts),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "duration_s": round(self.duration_s, 4),
        } | ({} if self.first_token is None else {"first_token": dict(self.first_token)})


def of_item(item: Item, sampling: Sampling) -> Conversation:
    return Conversation(
        id=item.id,
        messages=item.messages,
        sampling=sampling,
        follow_ups=item.follow_ups,
        is_raw=item.is_raw,
        choices=tuple(item.fields.get("choices", ())),
        rewarded=(item.fields["chosen"], item.fields["rejected"]) if "rejected" in item.fields else (),
    )


def of_judgment(request: JudgeRequest) -> Conversation:
    return Conversation(
        id=f"{request.id}#{request.part}",
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
    conversation: Conversation, chat: ChatModel, on_retry: Callable[[TransientError], None]
) -> Answer:
    """Ask everything, one request after the other; a request that fails for now is told and repeated."""
    started_s = time.monotonic()
    call = partial(call_with_retries, on_retry=on_retry)
    if conversation.choices:
        return _of_numbers(conversation, await _weigh(conversation, chat, call), started_s)
    if conversation.rewarded:
        return _of_numbers(conversation, await _reward(conversation, chat, call), started_s)
    messages = list(conversation.messages)
    if conversation.is_raw:
        complete = partial(chat.complete, messages[0].content, conversation.sampling)
        replies = [await call(complete)]
        messages.append(Message("assistant", replies[0].text))
    else:
        replies = await _talk(conversation, chat, messages, call)
    texts = tuple(reply.text for reply in replies)
    if conversation.is_usable is not None:
        texts = ("\n".join(texts),)  # a judge's two attempts are one judgment
    return Answer(
        id=conversation.id,
        texts=texts,
        messages=tuple(messages),
        prompt_tokens=_total([reply.prompt_tokens for reply in replies]),
        completion_tokens=_total([reply.completion_tokens for reply in replies]),
        duration_s=time.monotonic() - started_s,
        first_token=_first_token(replies[0], conversation),
    )


def _of_numbers(conversation: Conversation, numbers: list[float], started_s: float) -> Answer:
    text = json.dumps(numbers)
    messages = (*conversation.messages, Message("assistant", text))
    return Answer(
        id=conversation.id, texts=(text,), messages=messages, duration_s=time.monotonic() - started_s
    )


async def _talk(
    conversation: Conversation, chat: ChatModel, messages: list[Message], call: Call
) -> list[Reply]:
    """The replies in order; ``messages`` grows by every turn."""
    replies: list[Reply] = []
    follow_ups = list(conversation.follow_ups)
    while True:
        replies.append(await call(partial(chat.chat, tuple(messages), conversation.sampling)))
        messages.append(Message("assistant", replies[-1].text))
        if len(replies) == 1 and conversation.retry and not _is_usable(conversation, replies[0]):
            follow_ups.append(conversation.retry)
        if not follow_ups:
            return replies
        messages.append(Message("user", follow_ups.pop(0)))


def _is_usable(conversation: Conversation, reply: Reply) -> bool:
    return conversation.is_usable is None or conversation.is_usable(reply.text)


async def _reward(conversation: Conversation, chat: ChatModel, call: Call) -> list[float]:
    rewards = []
    for answer in conversation.rewarded:
        messages = (*conversation.messages, Message("assistant", answer))
        reward = await call(partial(chat.score, messages))
        if reward.scalar is None:
            raise HopelessError("the endpoint sends no scalar reward", kind="unsupported")
        rewards.append(reward.scalar)
    return rewards


async def _weigh(conversation: Conversation, chat: ChatModel, call: Call) -> list[float]:
    """Log-probability of each choice after the prompt, in nats.

    A server that ignores the request would give equal or missing numbers and so exact chance without an
    error; both are refused.
    """
    totals = []
    for prompt, choice in conversation.choices:
        tokens = await call(partial(chat.continuation_logprobs, prompt, choice))
        totals.append(sum(token.logprob for token in tokens))
        if not tokens or math.isnan(totals[-1]):
            raise HopelessError("the endpoint sent no log-probabilities of the choice", kind="unsupported")
    if len(totals) > 1 and len(set(totals)) == 1:
        raise HopelessError("the endpoint sent equal log-probabilities for all choices", kind="unsupported")
    return totals


def _first_token(reply: Reply, conversation: Conversation) -> dict[str, float] | None:
    if conversation.sampling.top_logprobs is None or not reply.logprobs:
        return None
    first = reply.logprobs[0]
    return dict(first.top) or {first.token: first.logprob}


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
