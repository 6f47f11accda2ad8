"""A file of prompts through one engine: every row answered once, a bounded number at a time."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from nemotron4.cli.console import note
from nemotron4.cli.journal import Journal
from nemotron4.cli.progress import Progress
from nemotron4.cli.rows import Request, carried, parse_json, read_request
from nemotron4.errors import (
    DataError,
    EngineBusyError,
    Nemotron4Error,
    RequestError,
    TemplateError,
    TokenizerError,
)
from nemotron4.inference.interface import InferenceEngine, SamplingParams
from nemotron4.records import FieldError, Generation, JsonObject
from nemotron4.server.answer_text import AnswerText


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line number (from 1) and bytes of every line that is not blank."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def as_json(params: SamplingParams) -> JsonObject:
    """The settings that differ from their defaults, for a record of the run."""
    changed = {
        field.name: getattr(params, field.name)
        for field in dataclasses.fields(params)
        if getattr(params, field.name) != getattr(SamplingParams(), field.name)
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def answer_file(
    load_engine: Callable[[], InferenceEngine],
    path: Path,
    journal: Journal,
    defaults: SamplingParams,
    *,
    max_in_flight: int,
) -> None:
    """Answer every row of the file that the journal does not hold yet, then give the output its name.

    The engine is loaded when there is something to answer. Interrupted, the journal keeps what is done.
    """
    numbers = [number for number, _ in numbered_lines(path)]
    num_done = len(journal.rows_done)
    if num_done:
        torn = ", an unfinished one was dropped" if journal.num_torn_bytes else ""
        note(f"continuing: {num_done} of {len(numbers)} rows are done{torn}")
    if num_done < len(numbers):
        engine = load_engine()
        try:
            with Progress(len(numbers), num_done) as progress:
                asyncio.run(
                    _answer_rows(engine, path, journal, defaults, progress, max_in_flight=max_in_flight)
                )
        except EngineStoppedError as error:
            raise Nemotron4Error(str(error), hint="the finished rows are kept: repeat the command") from error
        except KeyboardInterrupt:
            note(f"interrupted: {len(journal.rows_done)} rows are kept; the same command continues")
            raise
        finally:
            engine.close()
    journal.finish()


async def _answer_rows(
    engine: InferenceEngine,
    path: Path,
    journal: Journal,
    defaults: SamplingParams,
    progress: Progress,
    *,
    max_in_flight: int,
) -> None:
    """A row that cannot be served becomes an error record in its place. An engine that fails ends the run."""
    todo = (item for item in numbered_lines(path) if item[0] not in journal.rows_done)
    in_flight: set[asyncio.Task[tuple[int, JsonObject]]] = set()
    try:
        while True:
            while len(in_flight) < max_in_flight and (item := next(todo, None)) is not None:
                in_flight.add(asyncio.create_task(_answer(engine, *item, defaults, progress.count_token)))
            if not in_flight:
                return
            finished, in_flight = await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
            rows = [task.result() for task in finished]
            await asyncio.to_thread(journal.append, rows)
            for _, row in rows:
                progress.count_row(is_failed="error" in row)
    finally:
        for task in in_flight:
            task.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)


async def _answer(
    engine: InferenceEngine,
    number: int,
    line: bytes,
    defaults: SamplingParams,
    count_token: Callable[[], None],
) -> tuple[int, JsonObject]:
    """Row number and the row's answer or error record."""
    row: JsonObject = {}
    try:
        row = parse_json(line)
        generation = await _generate(engine, read_request(engine, row, number, defaults), count_token)
    except (FieldError, RequestError, TemplateError, TokenizerError) as error:
        message = error.message if isinstance(error, Nemotron4Error) else str(error)
        return number, {**carried(row), "line": number, "error": message}
    return number, {**carried(row), **generation.to_json()}


async def _generate(engine: InferenceEngine, request: Request, count_token: Callable[[], None]) -> Generation:
    while True:
        try:
            return await _generate_once(engine, request, count_token)
        except EngineBusyError as busy:
            await asyncio.sleep(busy.retry_after_s)


async def _generate_once(
    engine: InferenceEngine, request: Request, count_token: Callable[[], None]
) -> Generation:
    answer = AnswerText(engine.tokenizer, request.prompt_ids, request.params.stop_strings)
    text, finish_reason = "", None
    token_ids: list[int] = []
    logprobs: list[float] = []
    async for step in engine.stream(request.prompt_ids, request.params):
        text += answer.push(step)
        if step.token_id is not None:
            token_ids.append(step.token_id)
            count_token()
        if step.logprobs is not None:
            logprobs.append(step.logprobs.chosen.logprob)
        finish_reason = step.finish_reason
    if finish_reason is None or finish_reason == "abort":
        raise EngineStoppedError("the engine stopped before the answer was complete")
    return Generation(
        text=text,
        token_ids=tuple(token_ids),
        finish_reason=finish_reason,
        num_prompt_tokens=len(request.prompt_ids),
        logprobs=tuple(logprobs) if request.params.logprobs is not None else None,
    )


class EngineStoppedError(RuntimeError):
    """The engine ended a request by itself: no row is to blame, so the run ends."""
