"""A reward model's routes: ``POST /score`` and NVIDIA's hosted form of a chat completion."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from nemotron4.engine import Reward, RewardScorer
from nemotron4.errors import RequestError
from nemotron4.server.context import RequestContext, context_of
from nemotron4.server.openai_choices import Identity, check_model, warn_of_unknown
from nemotron4.server.openai_schemas import ChatRequest, Messages
from nemotron4.server.openai_tools import ToolFields
from nemotron4.server.page import Proxy
from nemotron4.server.rows import event_stream, until_disconnect
from nemotron4.server.settings import RemoteServer, Service
from nemotron4.text.answers import encode_text

# Of a chat completion, which nothing is drawn by here.
SAMPLING = ChatRequest.model_fields.keys() - ToolFields.model_fields.keys()


class ScoreRequest(BaseModel):
    """``messages`` end with the answer to judge; ``text`` is read as it is, at its last token."""

    model_config = ConfigDict(extra="allow")

    messages: Messages | None = None
    text: str | None = None
    model: str | None = None


class RewardReply(BaseModel):
    """``raw``: every output of the head. ``reward``: the card's weighted sum of ``attributes``."""

    raw: list[float]
    attributes: dict[str, float]
    reward: float


class HostedRequest(BaseModel):
    """The part of a chat completion that the hosted reward model reads."""

    model_config = ConfigDict(extra="allow")

    messages: Messages
    model: str | None = None
    stream: bool | None = None


async def score_rows(
    service: Service, scorer: RewardScorer, rows: Sequence[Sequence[int]], context: RequestContext
) -> list[Reward]:
    """The rows' rewards, counted and timed as generated rows are: the first token is the score."""
    context.num_prompt_tokens += sum(map(len, rows))
    started = time.monotonic()
    rewards = await scorer.score_async(rows)
    for _ in rows:
        service.metrics.row_ended(started, time.monotonic(), 1)
        context.finish_reasons.append("stop")
    return rewards


def reward_routes(service: Service, scorer: RewardScorer) -> APIRouter:
    router = APIRouter()

    async def scored(request: Request, encode: Callable[[], list[int]]) -> Reward:
        ids = await asyncio.to_thread(encode)
        [reward] = await score_rows(service, scorer, [ids], context_of(request.scope))
        return reward

    @router.post("/score")
    async def post_score(body: ScoreRequest, request: Request) -> RewardReply:
        """Judge one answer. Input that does not fit the context is refused, never cut."""
        warn_of_unknown(body, service, context_of(request.scope))
        check_model(body.model, service)
        if body.messages is not None and body.text is None:
            encode = partial(scorer.encode, body.messages)
        elif body.text is not None and body.messages is None:
            encode = partial(encode_text, service.engine, body.text)
        else:
            raise RequestError("give either messages or text")
        reward = await until_disconnect(request.receive, scored(request, encode))
        assert reward.scalar is not None, "an engine weighs its attributes"
        return RewardReply(raw=list(reward.raw), attributes=dict(reward.attributes), reward=reward.scalar)

    @router.post("/v1/chat/completions", response_model=None)
    async def post_chat(body: HostedRequest, request: Request) -> dict[str, Any] | Response:
        """NVIDIA's hosted form: the attributes are the tokens, their values the log-probabilities."""
        warn_of_unknown(body, service, context_of(request.scope), also_known=SAMPLING)
        identity = Identity.new("chatcmpl", check_model(body.model, service))
        work = scored(request, partial(scorer.encode, body.messages))
        if body.stream:
            return await event_stream(request, _events(identity, work), service)
        reward = await until_disconnect(request.receive, work)
        message = {"role": "assistant", "content": _text(reward)}
        choice = {"index": 0, "message": message, "logprobs": _logprobs(reward), "finish_reason": "stop"}
        return identity.chunk("chat.completion", [choice])

    return router


def _text(reward: Reward) -> str:
    return ",".join(f"{name}:{value}" for name, value in reward.attributes.items())


def _logprobs(reward: Reward) -> dict[str, Any]:
    return {
        "content": [
            {"token": name, "logprob": value, "bytes": None, "top_logprobs": []}
            for name, value in reward.attributes.items()
        ]
    }


async def _events(
    identity: Identity, work: Coroutine[Any, Any, Reward]
) -> AsyncGenerator[dict[str, Any], None]:
    """The same as a stream: all values in one event, then the end."""
    reward = await work
    delta = {"role": "assistant", "content": _text(reward)}
    choice = {"index": 0, "delta": delta, "logprobs": _logprobs(reward), "finish_reason": None}
    yield identity.chunk("chat.completion.chunk", [choice])
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    yield identity.chunk("chat.completion.chunk", [end])


def forwarded_score_routes(endpoint: RemoteServer) -> APIRouter:
    """``POST /score`` of a server whose own model does not judge: another one answers it."""
    router = APIRouter()
    upstream = Proxy(endpoint)

    @router.post("/score", include_in_schema=False)
    async def post_score(request: Request) -> Response:
        return await upstream.forward(request, "/score")

    return router
