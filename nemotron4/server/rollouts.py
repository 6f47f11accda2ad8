"""Answers for a trainer by the weights that it sends: ``POST /rollouts``, ``POST /weights``.

Only on a server that was started for it and asks for a key. A trainer sends its weights tensor by tensor in
parts, and then says that they are whole; requests that run finish by the weights they began with.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from nemotron4.engine import SamplingParams, TakesWeights
from nemotron4.errors import Nemotron4Error
from nemotron4.server.context import ApiError
from nemotron4.server.settings import Service
from nemotron4.text.answers import text_request, turn_request

if TYPE_CHECKING:
    import torch


class RolloutRequest(BaseModel):
    prompt_ids: list[int]
    seed: int


class RolloutsBody(BaseModel):
    """Prompts as token ids; ``answer`` ends each as a turn of the model's own format, if it has one."""

    requests: list[RolloutRequest]
    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=0)


class WeightPart(BaseModel):
    """Bytes of a tensor behind those sent before, in base64; the first part has ``start`` 0."""

    name: str
    shape: list[int]
    dtype: Literal["float32", "bfloat16"]
    start: int = Field(ge=0)
    data: str


class WeightsBody(BaseModel):
    """Parts of tensors; with ``version`` all are sent and take effect."""

    parts: list[WeightPart] = []
    version: int | None = None


class _Received:
    """What has been sent of the next weights, and the version of those that answer."""

    def __init__(self) -> None:
        self.version = 0
        self._tensors: dict[str, tuple[WeightPart, bytearray]] = {}
        self.exchange = asyncio.Lock()

    def add(self, part: WeightPart) -> None:
        try:
            data = base64.b64decode(part.data, validate=True)
        except binascii.Error as error:
            raise ApiError(400, f"{part.name}: the data is not base64: {error}", param="data") from error
        if part.start == 0:
            self._tensors[part.name] = (part, bytearray())
        if part.name not in self._tensors or len(self._tensors[part.name][1]) != part.start:
            raise ApiError(409, f"{part.name}: a part before byte {part.start} is missing", param="start")
        self._tensors[part.name][1].extend(data)

    def take(self) -> dict[str, torch.Tensor]:
        """The tensors, which are then forgotten; ApiError for one that is not whole."""
        import torch  # here: a server that takes no weights starts without it

        sent, self._tensors = self._tensors, {}
        found = {}
        for name, (part, data) in sent.items():
            flat = torch.frombuffer(data, dtype=getattr(torch, part.dtype)) if data else torch.empty(0)
            try:
                found[name] = flat.view(part.shape)
            except RuntimeError as error:
                raise ApiError(409, f"{name}: {len(data)} bytes came; expected shape {part.shape}") from error
        return found


def rollout_routes(service: Service, engine: TakesWeights) -> APIRouter:
    router = APIRouter()
    received = _Received()

    @router.post("/weights")
    async def put_weights(body: WeightsBody) -> dict[str, int]:
        """Parts of the trainer's weights, or the word that they are whole."""
        for part in body.parts:
            received.add(part)
        if body.version is not None:
            async with received.exchange:
                tensors = received.take()
                try:
                    await asyncio.to_thread(engine.replace_weights, tensors)
                except Nemotron4Error as error:
                    raise ApiError(409, error.message) from error
                received.version = body.version
        return {"version": received.version}

    @router.post("/rollouts")
    async def post_rollouts(body: RolloutsBody) -> dict[str, Any]:
        """An answer to each prompt, with the log-probabilities of its tokens, and the weights' version."""
        version = received.version
        requests = []
        for each in body.requests:
            params = SamplingParams(
                max_new_tokens=body.max_new_tokens,
                temperature=body.temperature,
                seed=each.seed,
                logprobs=0,
            )
            own = engine.prompt_format
            requests.append(
                turn_request(engine, own, tuple(each.prompt_ids), params)
                if own
                else text_request(engine, each.prompt_ids, params)
            )
        try:
            found = await asyncio.to_thread(engine.generate_each, requests)
        except Nemotron4Error as error:
            raise ApiError(400, error.message) from error
        return {"version": version, "answers": [each.to_json() for each in found]}

    return router
