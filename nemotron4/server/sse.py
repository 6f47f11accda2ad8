"""Server-sent events: one JSON object each, the last one ``[DONE]``."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nemotron4.server.errors import REQUEST_ERRORS, ApiError, api_error, error_object
from nemotron4.server.exchange import exchange_of
from nemotron4.server.rows import until_disconnect

# nginx would hold the events back without the second one.
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Event = dict[str, Any]


class EventStream(Response):
    """A response of events, made by ``event_stream``. A client that leaves ends their source."""

    def __init__(self, first: Event, others: AsyncGenerator[Event, None], request_id: str) -> None:
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["Content-Length"]
        self._first = first
        self._others = others
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._others):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _send_event(send, self._first)
            try:
                async for event in self._others:
                    await _send_event(send, event)
            except (ApiError, *REQUEST_ERRORS) as error:
                answer = error if isinstance(error, ApiError) else api_error(error)
                await _send_last(send, _data(error_object(answer)))
            except Exception:
                answer = ApiError(500, f"Internal server error; request id {self._request_id}.")
                await _send_last(send, _data(error_object(answer)))
                raise
            else:
                await _send_last(send, b"data: [DONE]\n\n")


async def event_stream(request: Request, events: AsyncGenerator[Event, None]) -> EventStream:
    """The response, once the first event is there: what fails before it still gets an error status."""
    first = await until_disconnect(request.receive, anext(events))
    return EventStream(first, events, exchange_of(request.scope).request_id)


def _data(event: Event) -> bytes:
    # JSON has no bare line break, so one event is one data line.
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _send_event(send: Send, event: Event) -> None:
    await send({"type": "http.response.body", "body": _data(event), "more_body": True})


async def _send_last(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": False})
