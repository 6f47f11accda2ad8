"""The app: one engine, all routes. ``nemotron4.server.run`` puts it on a port."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nemotron4 import __version__
from nemotron4.engine import InferenceEngine, RewardScorer, TakesWeights
from nemotron4.errors import ConfigError
from nemotron4.server.adapters import adapter_routes
from nemotron4.server.context import (
    CONTENT_TYPE,
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    AccessLog,
    ApiError,
    Metrics,
    RequestContext,
    error_object,
    error_response,
    html_error,
    json_response,
)
from nemotron4.server.embeddings import embedding_routes
from nemotron4.server.front_door import FrontDoor
from nemotron4.server.guard import Guard
from nemotron4.server.kserve import kserve_routes
from nemotron4.server.nemo import nemo_routes
from nemotron4.server.openai_api import openai_routes, validation_error
from nemotron4.server.page import PageTab, page_routes
from nemotron4.server.reward import forwarded_score_routes, reward_routes
from nemotron4.server.rollouts import rollout_routes
from nemotron4.server.settings import ServerSettings, Service
from nemotron4.server.tokenizer_api import tokenizer_routes

# Flask's order. A static-file rule, GET /<path:filename>, is why NeMo answers 405 to PUT on any other path.
GENERATE_ALLOWS = "PUT, GET, HEAD, OPTIONS"
OTHER_ALLOWS = "GET, HEAD, OPTIONS"
POST_ONLY = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")
OPENAI = ("/v1/models", *POST_ONLY)


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
    if path == "/v1" or path.startswith("/v1/") or f"/v1{path}" in OPENAI:  # an address without its /v1
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
        text = f"There is no {path[:100]} here. Routes: {', '.join(OPENAI)}."
        error = ApiError(404, text, code="unknown_url")
    return json_response(error_object(error), error.status, error.headers)


def create_app(
    engine: InferenceEngine,
    settings: ServerSettings | None = None,
    *,
    access_log: Callable[[RequestContext, list[str]], None] | None = None,
    tabs: Sequence[PageTab] = (),
    guard: Guard | None = None,
) -> FastAPI:
    """All routes over one engine, which the caller closes; ``app.state.service`` holds what they share.

    ``tabs`` are what the page shows next to the chat.
    """
    service = Service(engine, settings or ServerSettings(), Metrics(engine), guard=guard)
    service.require_distinct_names()
    # The interactive pages load scripts from the internet; the OpenAPI page itself is enough.
    app = FastAPI(
        title="nemotron4", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    if isinstance(engine, RewardScorer):  # before the OpenAI routes: the hosted form is a chat completion
        app.include_router(reward_routes(service, engine))
        app.include_router(kserve_routes(service, engine))
    elif service.settings.reward_model is not None:
        app.include_router(forwarded_score_routes(service.settings.reward_model))
    app.include_router(nemo_routes(service))
    app.include_router(openai_routes(service))
    app.include_router(embedding_routes(service))
    app.include_router(adapter_routes(service))
    app.include_router(tokenizer_routes(service))
    app.include_router(operator_routes(service))
    if service.settings.takes_weights:
        if not isinstance(engine, TakesWeights):
            raise ConfigError("this engine takes no weights of a trainer", hint="serve with the own engine")
        app.include_router(rollout_routes(service, engine))
    if service.settings.page is not None:
        app.include_router(page_routes(service, service.settings.page, tabs))
    for tab in tabs:
        app.include_router(tab.router)
    app.router.routes.append(Route("/{path:path}", UnknownPath()))
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_middleware(FrontDoor, service=service, log=access_log or AccessLog())
    return app


async def _refuse_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(request.url.path, validation_error(request.url.path, error))


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(request.url.path, ApiError(error.status_code, f"{error.detail}."))
