"""``PUT /generate``: the HTTP side of the server that the card's client was written for."""

from __future__ import annotations

import json

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nemotron4.server.errors import json_response
from nemotron4.server.exchange import exchange_of
from nemotron4.server.nemo_generation import generate
from nemotron4.server.nemo_schema import GENERATE_DOCUMENTATION
from nemotron4.server.nemo_validation import RefusalError, parse
from nemotron4.server.rows import until_disconnect
from nemotron4.server.service import Service

NOT_JSON_TYPE = (
    "Did not attempt to load JSON data because the request Content-Type was not 'application/json'."
)
NOT_JSON = "The browser (or proxy) sent a request that this server could not understand."


def nemo_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.put("/generate", **GENERATE_DOCUMENTATION)
    async def put_generate(request: Request) -> Response:
        exchange = exchange_of(request.scope)
        if not _is_json(request.headers.get("content-type", "")):
            return _message(NOT_JSON_TYPE, 415)
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            return _message(NOT_JSON, 400)
        try:
            checked = parse(body)
        except RefusalError as refusal:
            status = 400 if service.settings.nemo_compat == "fixed" else refusal.status
            return json_response(refusal.text, status)
        work = generate(checked, service, exchange)
        answer, headers = await until_disconnect(request.receive, work)
        return Response(answer, headers=headers, media_type="application/json")

    return router


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _message(text: str, status: int) -> Response:
    """flask-restful's form of an error."""
    return Response(json.dumps({"message": text}) + "\n", status, media_type="application/json")
