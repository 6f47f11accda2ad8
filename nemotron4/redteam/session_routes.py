"""The session store over HTTP: JSON in and out, for a page or a script. ``cli/serve`` mounts it on request.

Keys, limits and the Host check are those of the server that mounts it. Errors are ``{"error": {"message"}}``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from nemotron4.errors import ConfigError, DataError
from nemotron4.records import ATTRIBUTES, FieldError, JsonObject
from nemotron4.redteam.session_exports import export
from nemotron4.redteam.session_report import report
from nemotron4.redteam.session_store import SessionStore
from nemotron4.redteam.sessions import (
    CATEGORIES,
    OUTCOMES,
    SEVERITY_WORDS,
    TECHNIQUES,
    Assessment,
    Correction,
    Rating,
    Session,
)

PREFIX = "/redteam"
PAGE_SCRIPT = Path(__file__).parent / "web" / "redteam.js"  # draws the tab of the page over these routes
FILTERS = ("annotator", "model", "technique", "category", "outcome")
MAX_LISTED = 500

Result = TypeVar("Result")


def session_routes(store: SessionStore) -> APIRouter:
    """All routes below ``/redteam``; the caller closes the store."""
    router = APIRouter(prefix=PREFIX, include_in_schema=False)

    @router.get("/vocabulary")
    async def vocabulary() -> Response:
        """The words that a session may use, with their meaning."""
        return JSONResponse(
            {
                "techniques": dict(TECHNIQUES),
                "categories": dict(CATEGORIES),
                "outcomes": dict(OUTCOMES),
                "severities": list(SEVERITY_WORDS),
                "attributes": list(ATTRIBUTES),
            }
        )

    @router.get("/sessions")
    async def list_sessions(request: Request) -> Response:
        """``{"sessions": [...]}``, the newest first, without messages; filters are query parameters."""
        given = {name: request.query_params[name] for name in FILTERS if name in request.query_params}
        found = await run_in_threadpool(lambda: store.sessions(**given, newest_first=True, limit=MAX_LISTED))
        rows = [each.to_json() for each in found]
        for row in rows:
            row["num_messages"] = len(row.pop("messages"))
        return JSONResponse({"sessions": rows})

    @router.post("/sessions")
    async def record(request: Request) -> Response:
        row = await _body(request)
        # The store gives both: a page cannot backdate a session or write over another one.
        row = {**row, "id": None, "recorded_at": None}
        return await _answer(lambda: store.record(Session.from_json(row)).to_json(), status=201)

    @router.get("/sessions/{session_id}")
    async def one_session(session_id: str) -> Response:
        return await _answer(lambda: store.session(session_id).to_json(), missing=404)

    @router.post("/sessions/{session_id}/assessments")
    async def assess(session_id: str, request: Request) -> Response:
        row = {**await _body(request), "at": None}
        return await _answer(lambda: store.assess(session_id, Assessment.from_json(row)).to_json())

    @router.post("/sessions/{session_id}/ratings")
    async def rate(session_id: str, request: Request) -> Response:
        row = {**await _body(request), "at": None}
        return await _answer(lambda: store.rate(session_id, Rating.from_json(row)).to_json())

    @router.post("/sessions/{session_id}/corrections")
    async def correct(session_id: str, request: Request) -> Response:
        row = {**await _body(request), "at": None}
        return await _answer(lambda: store.correct(session_id, Correction.from_json(row)).to_json())

    @router.get("/report")
    async def get_report() -> Response:
        return await _answer(lambda: report(store.sessions()).to_json())

    @router.get("/export/{form}")
    async def get_export(form: str) -> Response:
        """``{"rows": [...], "left_out": {reason: number}}``; forms: sessions, preference, reward."""

        def rows() -> JsonObject:
            found = export(store.sessions(), form)
            return {
                "rows": [row if isinstance(row, dict) else row.to_json() for row in found.rows],
                "left_out": found.left_out,
            }

        return await _answer(rows)

    return router


async def _body(request: Request) -> JsonObject:
    """The JSON object of the request; an empty one where it is something else, so that a field is missing."""
    try:
        value = await request.json()
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


async def _answer(work: Callable[[], Any], *, status: int = 200, missing: int = 400) -> Response:
    """The result of the work, done beside the event loop, or the reason why it was refused."""
    try:
        return JSONResponse(await run_in_threadpool(work), status)
    except (DataError, ConfigError) as error:
        message = error.message if error.hint is None else f"{error.message} ({error.hint})"
        return JSONResponse({"error": {"message": message}}, missing)
    except FieldError as error:
        return JSONResponse({"error": {"message": str(error)}}, 400)
