"""The app: one engine, all routes. ``nemotron4.server.run`` puts it on a port."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nemotron4 import __version__
from nemotron4.engine import InferenceEngine, RewardScorer
from nemotron4.server.access_log import AccessLog
from nemotron4.server.errors import ApiError, error_response
from nemotron4.server.front_door import FrontDoor
from nemotron4.server.guard import Guard
from nemotron4.server.metrics import Metrics
from nemotron4.server.nemo_api import nemo_routes
from nemotron4.server.openai_api import openai_routes, validation_error
from nemotron4.server.operator_api import UnknownPath, operator_routes
from nemotron4.server.page import PageTab, page_routes
from nemotron4.server.reward_api import forwarded_score_routes, reward_routes
from nemotron4.server.reward_kserve import kserve_routes
from nemotron4.server.service import Service
from nemotron4.server.settings import ServerSettings


def create_app(
    engine: InferenceEngine,
    settings: ServerSettings | None = None,
    *,
    access_log: AccessLog | None = None,
    tabs: Sequence[PageTab] = (),
    guard: Guard | None = None,
) -> FastAPI:
    """All routes over one engine, which the caller closes; ``app.state.service`` holds what they share.

    ``tabs`` are what the page shows beside the chat.
    """
    service = Service(engine, settings or ServerSettings(), Metrics(engine), guard=guard)
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
    app.include_router(operator_routes(service))
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
