"""``POST /v1/chat/completions``: the model's own turn format around the messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from nemotron4.engine import PositionLogprobs, Tokenizer, TokenLogprob
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
    positions_of,
    sampling_params,
    token_name,
    usage,
)
from nemotron4.server.openai_schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    TokenLogprobs,
    TopLogprob,
)
from nemotron4.server.rows import event_stream, until_disconnect
from nemotron4.server.settings import Service
from nemotron4.text.answers import chat_request

CHUNK = "chat.completion.chunk"


async def answer_chat(body: ChatRequest, request: Request, service: Service) -> Response:
    context = context_of(request.scope)
    check_request(body, service, context)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if service.engine.prompt_format is None:
        raise ApiError(
            400,
            f"The model {service.engine.info.name!r} has no chat template, so its turns cannot be written. "
            "Send the whole prompt to /v1/completions or /generate.",
        )
    messages = body.messages
    prefix = messages[-1].content if body.echo and body.continue_final_message else ""
    choices = await _choices(body, messages, service)
    identity = Identity.new("chatcmpl", check_model(body.model, service))
    screened = Screened(choices, [messages] * len(choices), service, context)
    if body.stream:
        events = _events(body, choices, screened, identity, service, prefix)
        return await event_stream(request, events, service)
    await until_disconnect(request.receive, screened.run())
    answer = ChatCompletion(
        id=identity.id,
        created=identity.created,
        model=identity.model,
        choices=[
            ChatChoice(
                index=index,
                message=AnswerMessage(content=prefix + choice.text),
                logprobs=_logprobs(body, choice, service.engine.tokenizer),
                finish_reason=choice.finish_reason,
            )
            for index, choice in enumerate(choices)
        ],
        usage=usage(choices, len(choices)),
    )
    return screened.response(answer)


async def _choices(body: ChatRequest, messages: Sequence[Message], service: Service) -> list[Choice]:
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling_params(body, service, max_new_tokens=1, logprobs=logprobs)
    write = partial(
        chat_request,
        continues_last=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    # A checkpoint's own template is a program that runs beside us and may take its time.
    request = await asyncio.to_thread(write, service.engine, messages, params)
    request = fitted(request, body, _max_new_tokens(body), service)
    return choices_for([request], body.n or 1, service.engine.tokenizer)


def _max_new_tokens(body: ChatRequest) -> int | None:
    """What was asked for; None is all that the context still holds."""
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        text = "max_tokens and max_completion_tokens are two names of one limit; send one of them"
        raise ApiError(400, text, param="max_completion_tokens")
    return body.max_completion_tokens or body.max_tokens


def _logprobs(body: ChatRequest, choice: Choice, tokenizer: Tokenizer) -> ChatLogprobs | None:
    """Of the tokens not reported yet."""
    if not body.logprobs:
        return None
    positions = positions_of(choice, choice.take_tokens())
    return ChatLogprobs(content=[_position(each, tokenizer) for each in positions])


def _position(position: PositionLogprobs, tokenizer: Tokenizer) -> TokenLogprobs:
    top = [_token(each, tokenizer) for each in position.top]
    return TokenLogprobs(**_token(position.chosen, tokenizer).model_dump(), top_logprobs=top)


def _token(given: TokenLogprob, tokenizer: Tokenizer) -> TopLogprob:
    text, data = token_name(tokenizer, given.token_id)
    return TopLogprob(token=text, logprob=finite(given.logprob), bytes=data)


async def _events(
    body: ChatRequest,
    choices: list[Choice],
    screened: Screened,
    identity: Identity,
    service: Service,
    prefix: str,
) -> AsyncGenerator[dict[str, Any], None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    more: dict[str, object] = {"usage": None} if with_usage else {}
    tokenizer = service.engine.tokenizer
    started: set[int] = set()

    def chunk(
        index: int, delta: dict[str, object], logprobs: ChatLogprobs | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        shown = None if logprobs is None else logprobs.model_dump()
        part = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}
        return identity.chunk(CHUNK, [part], **more)

    async with aclosing(screened.parts()) as parts:
        async for index, text, is_whole in parts:
            if index not in started:
                started.add(index)
                yield chunk(index, {"role": "assistant", "content": prefix, "refusal": None})
            if text:
                yield chunk(index, {"content": text}, _logprobs(body, choices[index], tokenizer))
            if is_whole:
                yield chunk(index, {}, reason=choices[index].finish_reason)
    if screened.guard is not None:
        yield identity.chunk(CHUNK, [], **more, guard=screened.report)
    if with_usage:
        yield identity.chunk(CHUNK, [], usage=usage(choices, len(choices)).model_dump())
