"""``POST /v1/embeddings``: the mean of a language model's last hidden states, in OpenAI's form."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from nemotron4.server.context import ApiError, context_of
from nemotron4.server.openai_choices import check_model, warn_of_unknown
from nemotron4.server.openai_schemas import ERRORS, IdLists, Ids, Ignored, Strings
from nemotron4.server.rows import check_length, collect, text_ids, until_disconnect
from nemotron4.server.settings import Service
from nemotron4.text.answers import EMBEDDING, encode_text, text_request

MAX_INPUTS = 2048  # OpenAI's


class EmbeddingsRequest(BaseModel):
    """A text, its token ids, or several of either."""

    model_config = ConfigDict(strict=True, extra="allow")

    input: str | Strings | Ids | IdLists
    model: str | None = Field(None, description="The name that /v1/models gives, or left out.")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, description="The model's own number, or left out.")
    truncate_prompt_tokens: int | None = Field(None, ge=1, description="Keep so many at the input's end.")
    user: Ignored


class EmbeddingRow(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingRow]
    model: str
    pooling: Literal["mean of the last hidden states, normalised"] = (
        "mean of the last hidden states, normalised"
    )
    usage: EmbeddingsUsage


def embedding_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings", responses=ERRORS)
    async def create_embeddings(body: EmbeddingsRequest, request: Request) -> Embeddings:
        """Vectors of length 1. The model was trained to write text, not to compare it."""
        context = context_of(request.scope)
        warn_of_unknown(body, service, context)
        name = check_model(body.model, service)
        inputs = await _ids(body, service)
        for ids in inputs:
            check_length(service.engine, len(ids), 0, param="input")
        params = replace(EMBEDDING, adapter=service.adapter_of(body.model))
        rows = [text_request(service.engine, ids, params) for ids in inputs]
        work = collect(service.engine, rows, context, service.metrics)
        vectors = [answer.embedding() for answer in await until_disconnect(request.receive, work)]
        if body.dimensions not in (None, len(vectors[0])):
            text = f"dimensions is {body.dimensions}; this model's embeddings have {len(vectors[0])}"
            raise ApiError(400, text, param="dimensions", code="unsupported_parameter")
        encode = _base64 if body.encoding_format == "base64" else list
        num_tokens = sum(map(len, inputs))
        return Embeddings(
            data=[EmbeddingRow(index=i, embedding=encode(vector)) for i, vector in enumerate(vectors)],
            model=name,
            usage=EmbeddingsUsage(prompt_tokens=num_tokens, total_tokens=num_tokens),
        )

    return router


async def _ids(body: EmbeddingsRequest, service: Service) -> list[list[int]]:
    """Token ids of each input."""
    given = (
        [body.input]
        if isinstance(body.input, str) or (body.input[:1] and isinstance(body.input[0], int))
        else body.input
    )
    if not 0 < len(given) <= MAX_INPUTS:
        raise ApiError(400, f"input: {len(given)} texts; expected 1 to {MAX_INPUTS}", param="input")
    texts = [each for each in given if isinstance(each, str)]
    encoded = iter(await text_ids(lambda text: encode_text(service.engine, text), texts))
    inputs = [list(each) if isinstance(each, list) else next(encoded) for each in given]
    if [] in inputs:
        raise ApiError(400, f"input: text {inputs.index([])} is empty", param="input")
    if body.truncate_prompt_tokens is not None:
        inputs = [ids[-body.truncate_prompt_tokens :] for ids in inputs]
    return inputs


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's own client asks for."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
