"""The OpenAI routes and how their bodies are refused."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from nemotron4.errors import unknown_name
from nemotron4.server.adapters import LoadAdapter, UnloadAdapter
from nemotron4.server.context import ApiError
from nemotron4.server.embeddings import EmbeddingsRequest
from nemotron4.server.openai_chat import answer_chat
from nemotron4.server.openai_choices import check_model
from nemotron4.server.openai_completions import answer_completion
from nemotron4.server.openai_schemas import (
    ERRORS,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
    StreamOptions,
)
from nemotron4.server.settings import Service
from nemotron4.server.structured import NvExt, ResponseFormat, StructuredOutputs

BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/v1/load_lora_adapter": LoadAdapter,
    "/v1/unload_lora_adapter": UnloadAdapter,
}
_PARTS: Mapping[str, type[BaseModel]] = {
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
    "structured_outputs": StructuredOutputs,
    "nvext": NvExt,
}
_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with stream: true as server-sent events.",
        "content": {"text/event-stream": {}},
    }
}


def openai_routes(service: Service) -> APIRouter:
    router = APIRouter()
    created = int(time.time())

    def card(name: str) -> ModelCard:
        length = service.engine.info.context_length
        parent = service.model_names[0] if service.adapter_of(name) else None
        return ModelCard(id=name, created=created, context_length=length, max_model_len=length, parent=parent)

    @router.get("/v1/models", responses=ERRORS)
    async def list_models() -> ModelList:
        """The model that this server has, under each of its names, and its adapters."""
        return ModelList(data=list(map(card, service.model_names)))

    @router.get("/v1/models/{model:path}", responses=ERRORS)
    async def get_model(model: str) -> ModelCard:
        """The model, if it is the one that this server has."""
        return card(check_model(model, service))

    @router.post("/v1/completions", response_model=Completion, responses={**ERRORS, **_STREAMED})
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue raw text or token ids. No template is applied."""
        return await answer_completion(body, request, service)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**ERRORS, **_STREAMED})
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation in the model's own turn format."""
        return await answer_chat(body, request, service)

    return router


def validation_error(path: str, error: RequestValidationError) -> ApiError:
    """Every field that is wrong, each in one sentence; ``param`` and ``code`` are of the first."""
    fields: dict[str, list[Mapping[str, Any]]] = {}
    for problem in error.errors():
        fields.setdefault(str(problem["loc"][1:2]), []).append(problem)
    found = [_field_error(path, problems) for problems in fields.values()]
    return ApiError(400, "; ".join(each.message for each in found), param=found[0].param, code=found[0].code)


def _field_error(path: str, problems: Sequence[Mapping[str, Any]]) -> ApiError:
    first = problems[0]
    location = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}.")
    if not location:
        return ApiError(400, "The body must be a JSON object, sent with Content-Type: application/json.")
    field = location[0]
    if first["type"] == "message":
        return ApiError(400, f"messages{first['msg']}", param="messages")
    if first["type"] == "extra_forbidden":
        name = location[-1]
        known = _known_fields(path, location)
        message, hint = unknown_name("field", name[:60], known)
        return ApiError(
            400, f"{message}; {hint}" if known else message, param=name[:60], code="unknown_parameter"
        )
    if first["type"] == "unsupported":
        where = ".".join(part for part in location if part.islower() or part.isdigit())
        return ApiError(400, f"{where}: {first['msg']}", param=field, code="unsupported_parameter")
    # A value that may have several types has one problem for each of them.
    text = "; or ".join(sorted({str(each["msg"]) for each in problems})[:4])
    return ApiError(400, f"{field}: {text}", param=field)


def _known_fields(path: str, location: Sequence[str]) -> list[str]:
    owner = BODIES.get(path)
    for part in location[:-1]:
        owner = _PARTS.get(part, owner)
    return [each.alias or name for name, each in owner.model_fields.items()] if owner is not None else []
