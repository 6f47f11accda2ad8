"""The outermost layer: identifies, refuses, measures and logs every request before and after the routes."""

from __future__ import annotations

import asyncio
import base64
import hmac
import re
import traceback
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemotron4.server.context import (
    KEY,
    REQUEST_ERRORS,
    ApiError,
    ClientGoneError,
    RequestContext,
    api_error,
    error_response,
)
from nemotron4.server.settings import ServerSettings, Service, is_address

ROUTES = frozenset(
    {
        "/",
        "/generate",
        "/health",
        "/metrics",
        "/openapi.json",
        "/score",
        "/v2/models/reward_model/infer",
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/page/info",
        "/page/prompt",
        "/page/compare",
    }
)
PAGE_FILES = "/web"  # one name in metrics for all files of the page
# The page must be there before it can ask for a key; it holds nothing that is not in the package.
PAGE_ROUTES = frozenset({"/", PAGE_FILES})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OBSERVERS = frozenset({"/health", "/metrics"})  # answered while the server drains; do not hold it up
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, PUT",
    "Access-Control-Max-Age": "600",
}
DEFAULT_HEADERS = "Authorization, Content-Type, X-Request-Id"
CLIENT_GONE = 499  # nginx's number for a client that left before the answer; only in log and metrics
# So much of a body that is too large is read and thrown away, so that the client gets to read the answer.
DISCARD_BYTES = 64 * 2**20
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class FrontDoor:
    """ASGI middleware. ``log`` gets every finished context and the trace of an unexpected exception."""

    def __init__(
        self, app: ASGIApp, service: Service, log: Callable[[RequestContext, list[str]], None]
    ) -> None:
        self._app = app
        self._service = service
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = _new_context(scope, self._service.settings)
        scope[KEY] = context
        gate = self._service.gate
        is_counted = context.route not in OBSERVERS
        gate.num_in_flight += is_counted
        trace: list[str] = []
        try:
            trace = await self._serve(scope, receive, self._marked(send, context), context)
        finally:
            gate.num_in_flight -= is_counted
            context.status = context.status or CLIENT_GONE
            self._service.metrics.request_ended(context)
            self._log(context, trace)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, context: RequestContext) -> list[str]:
        """Answer; returns the trace of a defect without its message, which may quote a prompt."""
        try:
            if _is_preflight(scope, context):
                await Response(status_code=204, headers=_preflight(scope))(scope, receive, send)
                return []
            self._admit(scope, context)
            receive = await self._with_body(scope, receive)
            await self._app(scope, receive, send)
        except (ApiError, *REQUEST_ERRORS) as error:
            answer = error if isinstance(error, ApiError) else api_error(error)
            await error_response(context.path, answer)(scope, receive, send)
        except ClientGoneError as error:
            context.error = type(error).__name__
        except Exception as error:
            context.error = type(error).__name__
            if not context.status:
                answer = ApiError(500, f"Internal server error; request id {context.request_id}.")
                await error_response(context.path, answer)(scope, receive, send)
            frames = traceback.extract_tb(error.__traceback__)
            return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return []

    def _admit(self, scope: Scope, context: RequestContext) -> None:
        """Raise ApiError for what needs no look at the body."""
        headers = Headers(scope=scope)
        settings = self._service.settings
        if not _is_known_host(headers.get("host", ""), settings):
            raise ApiError(
                403,
                "The Host header does not name this server, which answers to localhost and addresses only. "
                "Start it with --allowed-host NAME to answer to another name.",
            )
        if context.origin is None and not _is_own_origin(
            headers.get("origin", ""), headers.get("host", ""), settings
        ):
            raise ApiError(
                403,
                "The Origin header names another site, whose pages may not use this server. "
                "Start it with --allowed-origin ORIGIN to let them, or with --allowed-host NAME if the page "
                "of this server is reached through that name.",
            )
        if self._service.gate.is_draining and context.route not in OBSERVERS:
            leaving = {"Connection": "close", "Retry-After": "10"}
            raise ApiError(503, "The server is shutting down and takes no new requests.", headers=leaving)
        is_keyless = context.route == "/health" or (
            context.route in PAGE_ROUTES and context.method in ("GET", "HEAD")
        )
        if settings.page and settings.page.login and _port(scope) == settings.page.port:
            _check_login(headers.get("authorization", ""), settings.page.login)
        elif settings.api_keys and not is_keyless:
            _check_key(headers.get("authorization", ""), settings.api_keys)

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body within the limits of size and time; the routes then get it from memory."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        settings = self._service.settings
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                body = await _read_body(receive, settings.max_body_bytes)
        except TimeoutError:
            close = {"Connection": "close"}
            text = f"The request body did not arrive within {settings.body_timeout_s:g} seconds."
            raise ApiError(408, text, headers=close) from None
        pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return replay

    def _marked(self, send: Send, context: RequestContext) -> Send:
        """Add the request id to the answer, note its status, and drop a client that reads nothing."""

        async def marked_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                context.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = context.request_id
                headers["X-Content-Type-Options"] = "nosniff"
                if context.origin is not None:
                    headers["Access-Control-Allow-Origin"] = context.origin
                    headers["Access-Control-Expose-Headers"] = "X-Request-Id, Warning, Retry-After"
                    headers.add_vary_header("Origin")
                if context.warnings:  # RFC 7234, section 5.5: 299 is "miscellaneous", "-" an unnamed agent
                    text = "; ".join(context.warnings).encode("ascii", "replace").decode()
                    headers["Warning"] = '299 - "' + text.replace('"', "'") + '"'
            try:
                async with asyncio.timeout(self._service.settings.send_timeout_s):
                    await send(message)
            except TimeoutError:
                raise ClientGoneError from None

        return marked_send


def _new_context(scope: Scope, settings: ServerSettings) -> RequestContext:
    given = Headers(scope=scope).get("x-request-id", "")
    origin = Headers(scope=scope).get("origin")
    is_allowed = origin in settings.allowed_origins or "*" in settings.allowed_origins
    path = scope["path"]
    return RequestContext(
        request_id=given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex,
        method=scope["method"] if scope["method"] in METHODS else "other",
        origin=origin if is_allowed else None,
        path=path if len(path) <= 200 else path[:200] + "...",
        route=path if path in ROUTES else PAGE_FILES if path.startswith(f"{PAGE_FILES}/") else "other",
    )


def _is_preflight(scope: Scope, context: RequestContext) -> bool:
    """A browser's question whether a page of an allowed site may send a request; it carries no key."""
    asks = "access-control-request-method" in Headers(scope=scope)
    return scope["method"] == "OPTIONS" and context.origin is not None and asks


def _preflight(scope: Scope) -> dict[str, str]:
    """All headers that the page asks for: OpenAI's own client sends about ten of its own."""
    asked = Headers(scope=scope).get("access-control-request-headers", DEFAULT_HEADERS)
    return {**PREFLIGHT, "Access-Control-Allow-Headers": asked}


def _is_known_host(host: str, settings: ServerSettings) -> bool:
    """False for a name that a hostile page made resolve to this machine (DNS rebinding).

    Only a server on a loopback address relies on being unreachable, and only a name can be rebound.
    """
    if not settings.is_loopback or not host:
        return True
    name = _host_name(host)
    return name == "localhost" or is_address(name) or _is_allowed(name, settings)


def _is_own_origin(origin: str, host: str, settings: ServerSettings) -> bool:
    """False for a browser's request from a page of another site. Other clients send no Origin.

    Such a page could read no answer (no CORS header is sent), but it could make the model work.
    """
    authority = origin.partition("://")[2]
    return not origin or authority.lower() == host.lower() or _is_allowed(_host_name(authority), settings)


def _host_name(authority: str) -> str:
    return re.sub(r":\d*$", "", authority).lower().rstrip(".")


def _is_allowed(name: str, settings: ServerSettings) -> bool:
    return name in {each.lower() for each in settings.allowed_hosts}


def _port(scope: Scope) -> int | None:
    """The port of this machine at which the request came in."""
    server = scope.get("server")
    return server[1] if server else None


def _check_key(authorization: str, keys: tuple[str, ...]) -> None:
    scheme, _, given = authorization.partition(" ")
    # Every key is compared, in constant time each: the time tells nothing about how near a guess is.
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        text = "The API key is missing." if not authorization else "The API key is wrong."
        text += " Send it as the header 'Authorization: Bearer KEY'."
        raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _check_login(authorization: str, login: tuple[str, str]) -> None:
    """HTTP Basic: the browser asks for name and password by itself."""
    scheme, _, given = authorization.partition(" ")
    wanted = base64.b64encode(":".join(login).encode())
    if scheme.lower() != "basic" or not hmac.compare_digest(given.strip().encode(), wanted):
        ask = {"WWW-Authenticate": 'Basic realm="nemotron4", charset="UTF-8"'}
        raise ApiError(401, "Name and password of the page are missing or wrong.", headers=ask)


async def _read_body(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size, is_whole = 0, False
    while not is_whole:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        is_whole = not message.get("more_body", False) or size > limit + DISCARD_BYTES
    if size > limit:
        close = {"Connection": "close"}
        raise ApiError(413, f"The request body is larger than the limit of {limit} bytes.", headers=close)
    return b"".join(parts)
