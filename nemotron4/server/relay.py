"""Requests of the page that another server answers: a second model, a reward model.

The page may talk to its own server only (its content-security policy, and no server here sends CORS headers),
so this one passes such a request on: to one address, to the paths named in the code, without the caller's
headers and key, and without following redirects.
"""

from __future__ import annotations

from typing import Any

import aiohttp
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nemotron4.server.errors import ApiError
from nemotron4.server.rows import until_disconnect
from nemotron4.server.settings import Endpoint

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 600.0  # between two pieces of an answer


class Upstream:
    """One other server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.url = endpoint.url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if endpoint.api_key:
            self._headers["Authorization"] = f"Bearer {endpoint.api_key}"

    async def get_json(self, path: str) -> Any:
        """The decoded answer; ApiError 502 with the reason when there is none."""
        try:
            async with (
                self._session() as session,
                session.get(self.url + path, allow_redirects=False) as answer,
            ):
                if answer.status != 200:
                    raise ApiError(502, f"{self.url}{path} answered {answer.status}")
                return await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._unreachable(error) from error

    async def relay(self, request: Request, path: str) -> Response:
        """The other server's answer to this request's body, piece by piece as it comes."""
        return _Relayed(self, path, await request.body())

    def _session(self) -> aiohttp.ClientSession:
        # One for each request: people click less often than a connection costs.
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S)
        return aiohttp.ClientSession(headers=self._headers, timeout=timeout)

    def _unreachable(self, error: Exception) -> ApiError:
        reason = str(error) or type(error).__name__
        return ApiError(502, f"{self.url} does not answer: {reason}")


class _Relayed(Response):
    def __init__(self, upstream: Upstream, path: str, body: bytes) -> None:
        super().__init__()
        self._upstream = upstream
        self._path = path
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._pass_on(send))

    async def _pass_on(self, send: Send) -> None:
        upstream, has_started = self._upstream, False
        try:
            async with (
                upstream._session() as session,
                session.post(upstream.url + self._path, data=self._body, allow_redirects=False) as answer,
            ):
                kind = answer.headers.get("Content-Type", "application/json")
                headers = [(b"content-type", kind.encode("latin-1")), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": answer.status, "headers": headers})
                has_started = True
                async for piece in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if has_started:  # cut off: the client sees an answer without its end
                raise
            raise upstream._unreachable(error) from error
