"""``POST /v1/completions``: continue raw text or token ids; no template is applied."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nemotron4.engine import InferenceEngine, PositionLogprobs, SamplingRequest, Tokenizer
from nemotron4.errors import RequestError
from nemotron4.records import Message
from nemotron4.server.context import ApiError, context_of
from nemotron4.server.openai_choices import (
    Choice,
    Identity,
    Screened,
    check_model,
    check_request,
    choices_for,
    finite,
    fitted,
    sampling_params,
    usage,
    usage_in_chunks,
)
from nemotron4.server.openai_schemas import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from nemotron4.server.rows import event_stream, text_ids, until_disconnect
from nemotron4.server.settings import Service
from nemotron4.text.answers import encode_text, text_request
from nemotron4.text.tokenizer import TextStream

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def answer_completion(body: CompletionRequest, request: Request, service: Service) -> Response:
    context = context_of(request.scope)
    check_request(body, service, context)
    n = body.n or 1
    if body.best_of not in (None, 1):
        text = "best_of is not supported by this server: ask for n answers and choose among them"
        raise ApiError(400, text, param="best_of", code="unsupported_parameter")
    prompts, requests = await _requests(body, service)
    choices = choices_for(requests, n, service.engine.tokenizer)
    identity = Identity.new("cmpl", check_model(body.model, service))
    conversations = [[Message("user", text)] for text in prompts for _ in range(n)]
    screened = Screened(choices, conversations, service, context)
    run = _Run(body, service.engine.tokenizer, [text for text in prompts for _ in range(n)])
    if body.stream:
        events = _events(run, choices, n, identity, screened)
        return await event_stream(request, events, service)
    await until_disconnect(request.receive, screened.run())
    answer = Completion(
        id=identity.id,
        created=identity.created,
        model=identity.model,
        choices=[run.choice(index, choice) for index, choice in enumerate(choices)],
        usage=usage(choices, n),
    )
    return screened.response(answer)


async def _requests(body: CompletionRequest, service: Service) -> tuple[list[str], list[SamplingRequest]]:
    """Text of each prompt and its request."""
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ApiError(400, "prompt: the list is empty; expected at least one prompt", param="prompt")
    engine = service.engine
    max_new_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    prompt_logprobs = body.logprobs if body.echo else None
    params = sampling_params(
        body, service, max_new_tokens=max_new_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs
    )
    if isinstance(given[0], str):
        encode = partial(_text_ids, engine, is_bare=body.add_special_tokens is False)
        rows = await text_ids(encode, given)
    else:
        rows = given
    if not all(rows):
        raise ApiError(400, "prompt: expected at least one token", param="prompt")
    try:
        whole = [text_request(engine, ids, params) for ids in rows]
    except RequestError as error:
        raise ApiError(400, error.message, param="prompt") from error
    requests = [fitted(request, body, max_new_tokens, service) for request in whole]
    if isinstance(given[0], str) and body.truncate_prompt_tokens is None:
        return given, requests
    return [engine.tokenizer.decode(request.prompt_ids) for request in requests], requests


def _text_ids(engine: InferenceEngine, text: str, *, is_bare: bool) -> list[int]:
    return engine.tokenizer.encode(text) if is_bare else encode_text(engine, text)


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
            positions = [None, *choice.answer.prompt_logprobs]
            for token_id, position in zip(choice.answer.request.prompt_ids, positions, strict=True):
                self._add(columns, token_id, position, offset)
                offset += len(stream.push(token_id)) or self._num_spelled(index, token_id, offset)
        for number in choice.take_tokens():
            token_id, position = choice.answer.token_ids[number], choice.answer.logprobs[number]
            self._add(columns, token_id, position, prompt_length + choice.answer.starts[number])
        return columns

    def _num_spelled(self, index: int, token_id: int, offset: int) -> int:
        """Characters of a control piece that the prompt spells here; a BOS that was put first has none."""
        if not self.tokenizer.is_control(token_id):
            return 0
        piece = self.tokenizer.piece(token_id)
        is_spelled = self.prompt_texts[index].startswith(piece, offset)
        return len(piece) if is_spelled and self.tokenizer.encode(piece) == [token_id] else 0

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
            more = usage_in_chunks(run.body, choices, n)
            yield identity.chunk("text_completion", [part], **more)
    if screened.guard is not None:
        more = usage_in_chunks(run.body, choices, n)
        yield identity.chunk("text_completion", [], **more, guard=screened.report)
    if with_usage:
        yield identity.chunk("text_completion", [], usage=usage(choices, n).model_dump())
