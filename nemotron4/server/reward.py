"""A reward model's routes: ``POST /score`` and NVIDIA's hosted form of a chat completion."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from nemotron4.engine import Reward, RewardScorer
from nemotron4.errors import RequestError
from nemotron4.records import Message
from nemotron4.server.context import context_of
from nemotron4.server.page import Proxy
from nemotron4.server.settings import Endpoint, Service


class Turn(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str


class ScoreRequest(BaseModel):
    """``messages`` end with the answer to judge; ``text`` is read as it is, at its last token."""

    model_config = ConfigDict(extra="forbid")

    messages: list[Turn] | None = None
    text: str | None = None


class Score(BaseModel):
    """``raw``: every output of the head. ``reward``: the card's weighted sum of ``attributes``."""

    raw: list[float]
    attributes: dict[str, float]
    reward: float


class HostedRequest(BaseModel):
    """The part of a chat completion that the hosted reward model reads; sampling settings are ignored."""

    model_config = ConfigDict(extra="ignore")

    messages: list[Turn]
    model: str | None = None


def reward_routes(service: Service, scorer: RewardScorer) -> APIRouter:
    router = APIRouter()

    async def scored(request: Request, turns: list[Turn]) -> Reward:
        messages = [Message(turn.role.lower(), turn.content) for turn in turns]
        [reward] = await asyncio.to_thread(scorer.score, [messages])
        context_of(request.scope).finish_reasons.append("stop")
        return reward

    @router.post("/score")
    async def post_score(body: ScoreRequest, request: Request) -> Score:
        """Judge one answer. Input that does not fit the context is refused, never cut."""
        if (body.messages is None) == (body.text is None):
            raise RequestError("give either messages or text")
        if body.messages is not None:
            reward = await scored(request, body.messages)
        else:
            assert body.text is not None
            ids = await asyncio.to_thread(service.engine.tokenizer.encode, body.text)
            [reward] = await asyncio.to_thread(scorer.score_ids, [ids])
        return Score(raw=list(reward.raw), attributes=dict(reward.attributes), reward=reward.scalar)  # type: ignore[arg-type]  # an engine always weighs

    @router.post("/v1/chat/completions")
    async def post_chat(body: HostedRequest, request: Request) -> dict[str, Any]:
        """NVIDIA's hosted form: the attributes are the tokens, their values the log-probabilities."""
        if body.model not in (None, service.engine.info.name):
            raise RequestError(f"model is {body.model!r}; this server has {service.engine.info.name!r}")
        reward = await scored(request, body.messages)
        content: list[dict[str, Any]] = [
            {"token": name, "logprob": value, "bytes": None, "top_logprobs": []}
            for name, value in reward.attributes.items()
        ]
        text = ",".join(f"{name}:{value}" for name, value in reward.attributes.items())
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "logprobs": {"content": content}, "finish_reason": "stop"}
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": service.engine.info.name,
            "choices": [choice],
        }

    return router


def forwarded_score_routes(endpoint: Endpoint) -> APIRouter:
    """``POST /score`` of a server whose own model does not judge: another one answers it."""
    router = APIRouter()
    upstream = Proxy(endpoint)

    @router.post("/score", include_in_schema=False)
    async def post_score(request: Request) -> Response:
        return await upstream.forward(request, "/score")

    return router
