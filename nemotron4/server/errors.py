"""How a refusal looks: a JSON string for /generate, HTML on unknown paths, else OpenAI's error object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.responses import HTMLResponse, Response

from nemotron4.errors import EngineBusyError, Nemotron4Error, RequestError, TemplateError, TokenizerError

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """A request is answered with an error status. ``param`` and ``code`` as in OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


# What the engine and the text layer raise when a request, not the server, is at fault.
REQUEST_ERRORS = (RequestError, TemplateError, TokenizerError, EngineBusyError)


class ClientGoneError(Exception):
    """The client closed the connection before its answer was whole."""


def json_text(value: object) -> bytes:
    """Flask's ``jsonify``: sorted keys, compact, ASCII, a newline at the end."""
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode("ascii")


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_text(value), status, dict(headers or {}), "application/json")


def error_object(error: ApiError) -> dict[str, object]:
    """OpenAI's error object."""
    kind = ERROR_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_response(path: str, error: ApiError) -> Response:
    """The error in the form that clients of this path read."""
    if path.startswith("/generate"):
        return json_response(error.message, error.status, error.headers)
    return json_response(error_object(error), error.status, error.headers)


def api_error(error: Nemotron4Error) -> ApiError:
    """The HTTP form of one of REQUEST_ERRORS."""
    message = error.message if error.hint is None else f"{error.message} ({error.hint})"
    if isinstance(error, EngineBusyError):
        seconds = str(max(1, math.ceil(error.retry_after_s)))
        return ApiError(429, message, code="engine_busy", headers={"Retry-After": seconds})
    return ApiError(400, message)


NOT_FOUND = (
    "The requested URL was not found on the server. If you entered the URL manually please check your "
    "spelling and try again."
)
METHOD_NOT_ALLOWED = "The method is not allowed for the requested URL."


def html_error(status: int, name: str, text: str, headers: Mapping[str, str] | None = None) -> Response:
    """The page that Flask answers with for an unknown route or method."""
    page = (
        f"<!doctype html>\n<html lang=en>\n<title>{status} {name}</title>\n<h1>{name}</h1>\n<p>{text}</p>\n"
    )
    return HTMLResponse(page, status, dict(headers or {}))
