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
from nemotron4.server.context import ApiError
from nemotron4.server.openai_chat import answer_chat
from nemotron4.server.openai_choices import model_not_found
from nemotron4.server.openai_completions import answer_completion
from nemotron4.server.openai_schemas import (
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorAnswer,
    ModelCard,
    ModelList,
    StreamOptions,
    TextPart,
)
from nemotron4.server.settings import Service

BODIES: Mapping[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
}
_PARTS: Mapping[str, type[BaseModel]] = {
    "messages": ChatMessage,
    "content": TextPart,
    "stream_options": StreamOptions,
}
_STATUSES = {
    400: "The request cannot be served, and why.",
    401: "The API key is missing or wrong.",
    403: "The Host header names somebody else.",
    404: "The model is not served here.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "A defect of the server.",
    503: "The server is shutting down.",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in _STATUSES.items()
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

    def card() -> ModelCard:
        info = service.engine.info
        return ModelCard(id=info.name, created=created, context_length=info.context_length)

    @router.get("/v1/models", responses=_ERRORS)
    async def list_models() -> ModelList:
        """The model that this server has."""
        return ModelList(data=[card()])

    @router.get("/v1/models/{model:path}", responses=_ERRORS)
    async def get_model(model: str) -> ModelCard:
        """The model, if it is the one that this server has."""
        if model != service.engine.info.name:
            raise model_not_found(model, service)
        return card()

    @router.post("/v1/completions", response_model=Completion, responses={**_ERRORS, **_STREAMED})
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue raw text or token ids. No template is applied."""
        return await answer_completion(body, request, service)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses={**_ERRORS, **_STREAMED})
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation in the model's own turn format."""
        return await answer_chat(body, request, service)

    return router


def validation_error(path: str, error: RequestValidationError) -> ApiError:
    """The first field that is wrong, in one sentence."""
    problems: Sequence[Mapping[str, Any]] = error.errors()
    first = problems[0]
    location = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {first['ctx']['error']}.")
    if not location:
        return ApiError(400, "The body must be a JSON object, sent with Content-Type: application/json.")
    field = location[0]
    if first["type"] == "extra_forbidden":
        name = location[-1]
        message, hint = unknown_name("field", name[:60], _known_fields(path, location))
        return ApiError(400, f"{message}; {hint}", param=name[:60], code="unknown_parameter")
    if first["type"] == "unsupported":
        where = ".".join(part for part in location if part.islower() or part.isdigit())
        return ApiError(400, f"{where}: {first['msg']}", param=field, code="unsupported_parameter")
    # A value that may have several types has one problem for each of them.
    messages = {str(each["msg"]) for each in problems if str(each["loc"][1:2]) == str(first["loc"][1:2])}
    text = "; or ".join(sorted(messages)[:4])
    return ApiError(400, f"{field}: {text}", param=field)


def _known_fields(path: str, location: Sequence[str]) -> list[str]:
    owner = BODIES.get(path)
    for part in location[:-1]:
        owner = _PARTS.get(part, owner)
    return list(owner.model_fields) if owner is not None else []
