"""Rows of one HTTP request on their way through the engine: started together, cancelled together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive

from nemotron4.engine import InferenceEngine, SamplingRequest, TokenStep
from nemotron4.server.errors import ApiError, ClientGoneError
from nemotron4.server.exchange import Exchange
from nemotron4.server.metrics import Metrics
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
    engine: InferenceEngine, rows: Sequence[SamplingRequest], exchange: Exchange, metrics: Metrics
) -> AsyncGenerator[tuple[int, TokenStep], None]:
    """Row number and step of every new token, as they come.

    The rows run ahead of a client that reads slowly: their steps wait here, bounded by the context length.
    The first row that fails ends all; closing the iterator cancels all.
    """
    queue: asyncio.Queue[tuple[int, TokenStep] | Exception] = asyncio.Queue()
    exchange.num_prompt_tokens += sum(len(row.prompt_ids) for row in rows)

    async def pump(index: int, row: SamplingRequest) -> None:
        started, first_token, num_tokens, is_ended = time.monotonic(), None, 0, False
        try:
            stream: Any = engine.stream(row.prompt_ids, row.params)
            async with aclosing(stream):
                async for step in stream:
                    if step.token_id is not None:
                        first_token = first_token or time.monotonic()
                        num_tokens += 1
                        exchange.num_new_tokens += 1
                    if step.finish_reason is not None:
                        exchange.finish_reasons.append(step.finish_reason)
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
    engine: InferenceEngine, rows: Sequence[SamplingRequest], exchange: Exchange, metrics: Metrics
) -> list[AnswerText]:
    """All rows to their ends."""
    answers = [AnswerText(engine.tokenizer, row) for row in rows]
    async with aclosing(steps(engine, rows, exchange, metrics)) as events:
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
