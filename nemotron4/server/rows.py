"""Rows of one HTTP request on their way through the engine, and their answer as server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nemotron4.engine import InferenceEngine, SamplingRequest, TokenStep
from nemotron4.server.context import (
    REQUEST_ERRORS,
    ApiError,
    ClientGoneError,
    Metrics,
    RequestContext,
    api_error,
    context_of,
    error_object,
)
from nemotron4.text.answers import AnswerText

# Longer texts are tokenised beside the event loop, so that nobody else waits for it.
INLINE_CHARACTERS = 20_000
# Below this the best token has all of the probability, up to ties, and its logits would overflow.
LEAST_TEMPERATURE = 1e-4

Result = TypeVar("Result")


def usable_temperature(temperature: float) -> float:
    """The temperature for the engine: 0, greedy, when it is too small to divide by."""
    return 0.0 if temperature < LEAST_TEMPERATURE else temperature


async def text_ids(encode: Callable[[str], list[int]], texts: Sequence[str]) -> list[list[int]]:
    """Ids of raw texts; long ones are tokenised beside the event loop."""
    if sum(map(len, texts)) <= INLINE_CHARACTERS:
        return list(map(encode, texts))
    return await asyncio.to_thread(lambda: list(map(encode, texts)))


def check_length(engine: InferenceEngine, num_prompt: int, num_new: int, *, param: str | None = None) -> None:
    """Refuse, with the numbers, what does not fit the context."""
    context = engine.info.context_length
    num_new = min(num_new, 10**12)  # an integer of thousands of digits cannot be written
    if num_prompt + num_new > context:
        raise ApiError(
            400,
            f"This model's context length is {context} tokens. The request has {num_prompt} prompt tokens "
            f"and asks for {num_new} new ones, {num_prompt + num_new} in all. Shorten the prompt or ask for "
            "fewer.",
            param=param,
            code="context_length_exceeded",
        )


async def steps(
    engine: InferenceEngine, rows: Sequence[SamplingRequest], context: RequestContext, metrics: Metrics
) -> AsyncGenerator[tuple[int, TokenStep], None]:
    """Row number and step of every new token, as they come.

    The rows run ahead of a client that reads slowly: their steps wait here, bounded by the context length.
    The first row that fails ends all; closing the iterator cancels all.
    """
    queue: asyncio.Queue[tuple[int, TokenStep] | Exception] = asyncio.Queue()
    context.num_prompt_tokens += sum(len(row.prompt_ids) for row in rows)

    async def pump(index: int, row: SamplingRequest) -> None:
        started, first_token, num_tokens, is_ended = time.monotonic(), None, 0, False
        try:
            stream: Any = engine.stream(row.prompt_ids, row.params)
            async with aclosing(stream):
                async for step in stream:
                    if step.token_id is not None:
                        first_token = first_token or time.monotonic()
                        num_tokens += 1
                        context.num_new_tokens += 1
                    if step.finish_reason is not None:
                        context.finish_reasons.append(step.finish_reason)
                        metrics.row_ended(started, first_token, num_tokens)
                    queue.put_nowait((index, step))
                    is_ended = step.finish_reason is not None
            if not is_ended:
                raise RuntimeError("the engine ended a row without a reason")
        except Exception as error:
            queue.put_nowait(error)

    pumps = [asyncio.create_task(pump(index, row)) for index, row in enumerate(rows)]
    try:
        num_open = len(rows)
        while num_open:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item[1].finish_reason == "abort":
                raise ApiError(503, "The server is shutting down; the answer is not whole.")
            num_open -= item[1].finish_reason is not None
            yield item
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def collect(
    engine: InferenceEngine, rows: Sequence[SamplingRequest], context: RequestContext, metrics: Metrics
) -> list[AnswerText]:
    """All rows to their ends."""
    answers = [AnswerText(engine.tokenizer, row) for row in rows]
    async with aclosing(steps(engine, rows, context, metrics)) as events:
        async for index, step in events:
            answers[index].push(step)
    return answers


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; if the client leaves first, the work is cancelled and ClientGoneError raised."""

    async def client_leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(client_leaves())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


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
    return EventStream(first, events, context_of(request.scope).request_id)


def _data(event: Event) -> bytes:
    # JSON has no bare line break, so one event is one data line.
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _send_event(send: Send, event: Event) -> None:
    await send({"type": "http.response.body", "body": _data(event), "more_body": True})


async def _send_last(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": False})
