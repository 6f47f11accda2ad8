"""``POST /v1/completions``: continue raw text or token ids; no template is applied."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nemotron4.inference.interface import PositionLogprobs
from nemotron4.records import Message
from nemotron4.server.answer_text import AnswerText
from nemotron4.server.errors import ApiError
from nemotron4.server.exchange import exchange_of
from nemotron4.server.guarded_choices import Screened
from nemotron4.server.openai_choices import (
    Choice,
    Identity,
    check_request,
    end_ids,
    finite,
    rows_for,
    sampling_params,
    usage,
    user_stops,
)
from nemotron4.server.openai_schemas import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from nemotron4.server.rows import check_length, encode, until_disconnect
from nemotron4.server.service import Service
from nemotron4.server.sse import event_stream
from nemotron4.text.tokenizer import TextStream, Tokenizer

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def answer_completion(body: CompletionRequest, request: Request, service: Service) -> Response:
    exchange = exchange_of(request.scope)
    check_request(body, service)
    n = body.n or 1
    if body.best_of not in (None, 1):
        text = "best_of is not supported by this server: ask for n answers and choose among them"
        raise ApiError(400, text, param="best_of", code="unsupported_parameter")
    prompts = await _prompts(body, service)
    choices = _choices(body, prompts, n, service)
    identity = Identity.new("cmpl", service.engine.info.name)
    conversations = [[Message("user", text)] for text, _ in prompts for _ in range(n)]
    screened = Screened(choices, conversations, service, exchange)
    run = _Run(body, service.engine.tokenizer, [text for text, _ in prompts for _ in range(n)])
    if body.stream:
        events = _events(run, choices, n, identity, screened)
        return await event_stream(request, events)
    await until_disconnect(request.receive, screened.run())
    answer = Completion(
        id=identity.id,
        created=identity.created,
        model=identity.model,
        choices=[run.choice(index, choice) for index, choice in enumerate(choices)],
        usage=usage(choices, n),
    )
    return screened.response(answer)


async def _prompts(body: CompletionRequest, service: Service) -> list[tuple[str, list[int]]]:
    """Text and ids of each prompt."""
    tokenizer = service.engine.tokenizer
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ApiError(400, "prompt: the list is empty; expected at least one prompt", param="prompt")
    is_text = isinstance(given[0], str)
    prompts: list[list[int]] = given
    if is_text:
        start = [tokenizer.bos_id] if service.engine.info.adds_bos and tokenizer.bos_id is not None else []
        prompts = [start + ids for ids in await encode(tokenizer, given)]
    last = tokenizer.vocab_size - 1
    for ids in prompts:
        if not ids:
            raise ApiError(400, "prompt: expected at least one token", param="prompt")
        if max(ids) > last:
            text = f"prompt: token id {max(ids)} is outside the vocabulary; the last is {last}"
            raise ApiError(400, text, param="prompt")
    texts = given if is_text else [tokenizer.decode(ids) for ids in prompts]
    return list(zip(texts, prompts, strict=True))


def _choices(
    body: CompletionRequest, prompts: Sequence[tuple[str, list[int]]], n: int, service: Service
) -> list[Choice]:
    max_new_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = []
    for _, ids in prompts:
        check_length(service.engine, len(ids), max_new_tokens, param="max_tokens")
        params.append(
            sampling_params(
                body,
                service,
                max_new_tokens=max_new_tokens,
                stop_ids=end_ids(service),
                stop_strings=user_stops(body),
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
            )
        )
    rows = rows_for([ids for _, ids in prompts], params, n, body.seed)
    tokenizer = service.engine.tokenizer
    return [Choice(row, AnswerText(tokenizer, row.prompt_ids, row.params.stop_strings)) for row in rows]


@dataclass(frozen=True)
class _Run:
    """What turns finished or growing choices into the parts of an answer."""

    body: CompletionRequest
    tokenizer: Tokenizer
    prompt_texts: Sequence[str]  # one for each choice

    def choice(self, index: int, choice: Choice) -> CompletionChoice:
        prompt = self.prompt_texts[index] if self.body.echo else ""
        return CompletionChoice(
            index=index,
            text=prompt + choice.text,
            logprobs=self.logprobs(index, choice, is_first=True),
            finish_reason=choice.finish_reason,
        )

    def logprobs(self, index: int, choice: Choice, *, is_first: bool) -> CompletionLogprobs | None:
        """Of the tokens not reported yet; with echo, the first time, of the prompt's too."""
        if self.body.logprobs is None:
            return None
        columns = CompletionLogprobs(
            tokens=[], token_logprobs=[], top_logprobs=[] if self.body.logprobs else None, text_offset=[]
        )
        prompt_length = len(self.prompt_texts[index]) if self.body.echo else 0
        if is_first and self.body.echo:
            stream, offset = TextStream(self.tokenizer), 0
            positions = [None, *choice.result.prompt_logprobs]
            for token_id, position in zip(choice.row.prompt_ids, positions, strict=True):
                self._add(columns, token_id, position, offset)
                offset += len(stream.push(token_id))
        for number in choice.take_tokens():
            token_id, position = choice.result.token_ids[number], choice.result.logprobs[number]
            self._add(columns, token_id, position, prompt_length + choice.answer.starts[number])
        return columns

    def _add(
        self, columns: CompletionLogprobs, token_id: int, position: PositionLogprobs | None, offset: int
    ) -> None:
        columns.tokens.append(self._name(token_id))
        columns.token_logprobs.append(None if position is None else finite(position.chosen.logprob))
        columns.text_offset.append(offset)
        if columns.top_logprobs is None:
            return
        if position is None:
            columns.top_logprobs.append(None)
            return
        top: dict[str, float] = {}
        for each in (*position.top, position.chosen):
            top.setdefault(self._name(each.token_id), finite(each.logprob))
        columns.top_logprobs.append(top)

    def _name(self, token_id: int) -> str:
        """The token's text; ``bytes:\\xe2\\x82`` for a part of a character, as OpenAI writes it."""
        data = self.tokenizer.token_bytes(token_id)
        if not data:
            return self.tokenizer.piece(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


async def _events(
    run: _Run, choices: list[Choice], n: int, identity: Identity, screened: Screened
) -> AsyncGenerator[dict[str, Any], None]:
    with_usage = bool(run.body.stream_options and run.body.stream_options.include_usage)
    more: dict[str, object] = {"usage": None} if with_usage else {}
    started: set[int] = set()
    async with aclosing(screened.parts()) as parts:
        async for index, text, is_whole in parts:
            is_first = index not in started
            if not (text or is_whole or (is_first and run.body.echo)):
                continue
            started.add(index)
            choice = choices[index]
            logprobs = run.logprobs(index, choice, is_first=is_first)
            part = {
                "index": index,
                "text": run.prompt_texts[index] + text if is_first and run.body.echo else text,
                "logprobs": None if logprobs is None else logprobs.model_dump(),
                "finish_reason": choice.finish_reason if is_whole else None,
            }
            yield identity.chunk("text_completion", [part], **more)
    if screened.guard is not None:
        yield identity.chunk("text_completion", [], **more, guard=screened.report)
    if with_usage:
        yield identity.chunk("text_completion", [], usage=usage(choices, n).model_dump())
