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
from nemotron4.server.settings import Service
from nemotron4.text.answers import AnswerText

# Longer texts are tokenised outside the event loop, so that nobody else waits for it.
INLINE_CHARACTERS = 20_000
# Below this the best token has all of the probability, up to ties, and its logits would overflow.
LEAST_TEMPERATURE = 1e-4

Result = TypeVar("Result")


def usable_temperature(temperature: float) -> float:
    """The temperature for the engine: 0, greedy, when it is too small to divide by."""
    return 0.0 if temperature < LEAST_TEMPERATURE else temperature


async def text_ids(encode: Callable[[str], list[int]], texts: Sequence[str]) -> list[list[int]]:
    """Ids of raw texts; long ones are tokenised outside the event loop."""
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
    stats = engine.stats()
    limit = stats.max_running + stats.max_waiting
    if len(rows) > limit:
        text = f"The request has {len(rows)} rows; this server has room for {limit}. Send fewer at a time."
        raise ApiError(400, text, code="too_many_rows")
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
HEADERS_AFTER_S = 0.5  # a stream that waits in the queue then sends its headers
COMMENT_S = 10.0  # and such a line as often, so that nobody on the way takes it for dead


class EventStream(Response):
    """A response of events, made by ``event_stream``. A client that leaves ends their source."""

    def __init__(
        self, first: asyncio.Task[Event], others: AsyncGenerator[Event, None], request_id: str
    ) -> None:
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["Content-Length"]
        self._first = first
        self._others = others
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        finally:
            self._first.cancel()
            await asyncio.gather(self._first, return_exceptions=True)
            await self._others.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while not (await asyncio.wait({self._first}, timeout=COMMENT_S))[0]:
                await _send(send, b": waiting\n\n")
            await _send(send, _data(self._first.result()))
            async for event in self._others:
                await _send(send, _data(event))
        except (ApiError, *REQUEST_ERRORS) as error:
            answer = error if isinstance(error, ApiError) else api_error(error)
            await _send(send, _data(error_object(answer)), is_last=True)
        except Exception:
            answer = ApiError(500, f"Internal server error; request id {self._request_id}.")
            await _send(send, _data(error_object(answer)), is_last=True)
            raise
        else:
            await _send(send, b"data: [DONE]\n\n", is_last=True)


async def event_stream(
    request: Request, events: AsyncGenerator[Event, None], service: Service
) -> EventStream:
    """The response, once the first event is there, or soon: what fails before it still gets an error status.

    A guard may refuse the prompt, so that its verdict is waited for.
    """
    first: asyncio.Task[Event] = asyncio.ensure_future(anext(events))
    patience = HEADERS_AFTER_S if service.guard is None else None
    try:
        await until_disconnect(request.receive, _finished(first, patience))
    except BaseException:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await events.aclose()
        raise
    return EventStream(first, events, context_of(request.scope).request_id)


async def _finished(task: asyncio.Task[Event], timeout_s: float | None) -> None:
    """Return when the task is done or the time is over; raise what it raised."""
    await asyncio.wait({task}, timeout=timeout_s)
    if task.done():
        task.result()


def _data(event: Event) -> bytes:
    # JSON has no bare line break, so one event is one data line.
    return b"data: " + json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _send(send: Send, data: bytes, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": not is_last})
