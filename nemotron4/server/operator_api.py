"""``/health`` and ``/metrics``, and what every other path answers: NeMo's 404 and 405, or OpenAI's form."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nemotron4.server.errors import (
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    ApiError,
    error_object,
    html_error,
    json_response,
)
from nemotron4.server.metrics import CONTENT_TYPE
from nemotron4.server.service import Service

# Flask's order. A static-file rule, GET /<path:filename>, is why NeMo answers 405 to PUT on any other path.
GENERATE_ALLOWS = "PUT, GET, HEAD, OPTIONS"
OTHER_ALLOWS = "GET, HEAD, OPTIONS"
POST_ONLY = ("/v1/completions", "/v1/chat/completions")


class Health(BaseModel):
    status: Literal["ok", "draining"]
    model: str


def operator_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.head("/health", include_in_schema=False)
    @router.get("/health", responses={503: {"model": Health, "description": "The server drains."}})
    async def get_health() -> Health:
        """Ready to generate. The port is closed until then."""
        health = Health(
            status="draining" if service.gate.is_draining else "ok", model=service.engine.info.name
        )
        if service.gate.is_draining:
            return json_response(health.model_dump(), 503)  # type: ignore[return-value]
        return health

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def get_metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router


class UnknownPath:
    """Everything that no other route answers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _answer(scope["method"], scope["path"])(scope, receive, send)


def _answer(method: str, path: str) -> Response:
    if path == "/v1" or path.startswith("/v1/"):
        return _openai_answer(method, path)
    allowed = GENERATE_ALLOWS if path == "/generate" else OTHER_ALLOWS
    if path == "/" or method in ("GET", "HEAD"):
        return html_error(404, "Not Found", NOT_FOUND)
    if method == "OPTIONS":
        return Response(headers={"Allow": allowed, "Content-Type": "text/html; charset=utf-8"})
    return html_error(405, "Method Not Allowed", METHOD_NOT_ALLOWED, {"Allow": allowed})


def _openai_answer(method: str, path: str) -> Response:
    if path in POST_ONLY or path.startswith("/v1/models"):
        allowed = "POST" if path in POST_ONLY else "GET"
        error = ApiError(405, f"{path} takes {allowed}, not {method}.", headers={"Allow": allowed})
    else:
        known = ", ".join(("/v1/models", *POST_ONLY))
        error = ApiError(404, f"There is no {path[:100]} here. Routes: {known}.", code="unknown_url")
    return json_response(error_object(error), error.status, error.headers)
