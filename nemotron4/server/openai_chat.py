"""``POST /v1/chat/completions``: the model's own turn format around the messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from nemotron4.engine import ChatFormat, PositionLogprobs, Tokenizer, TokenLogprob
from nemotron4.errors import RequestError
from nemotron4.records import Message
from nemotron4.server.context import ApiError, RequestContext, context_of
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
    usage_in_chunks,
    with_request_variables,
)
from nemotron4.server.openai_schemas import (
    AnswerMessage,
    CallingMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    TokenLogprobs,
    TopLogprob,
)
from nemotron4.server.openai_tools import AskedTools, asked_tools
from nemotron4.server.rows import event_stream, until_disconnect
from nemotron4.server.settings import Service
from nemotron4.text.answers import chat_request
from nemotron4.text.messages import with_calls_as_text
from nemotron4.text.tools import CallReader, ToolCall, read_calls

CHUNK = "chat.completion.chunk"


async def answer_chat(body: ChatRequest, request: Request, service: Service) -> Response:
    context = context_of(request.scope)
    check_request(body, service, context)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    own = _own_format(body, service, context)
    messages = body.messages
    prefix = messages[-1].content if body.echo and body.continue_final_message else ""
    tools = asked_tools(body, messages, own, service.settings.tool_format)
    choices = await _choices(body, own, messages, tools, service)
    identity = Identity.new("chatcmpl", check_model(body.model, service))
    judged = with_calls_as_text(messages, None)
    prefill = judged[-1].content if body.continue_final_message else ""
    screened = Screened(choices, [judged] * len(choices), service, context, prefill=prefill)
    if body.stream:
        events = _events(body, choices, screened, identity, service, prefix, tools)
        return await event_stream(request, events, service)
    await until_disconnect(request.receive, screened.run())
    answer = ChatCompletion(
        id=identity.id,
        created=identity.created,
        model=identity.model,
        choices=[
            _choice(index, choice, prefix, tools, _logprobs(body, choice, service.engine.tokenizer))
            for index, choice in enumerate(choices)
        ],
        usage=usage(choices, len(choices)),
    )
    return screened.response(answer)


def _own_format(body: ChatRequest, service: Service, context: RequestContext) -> ChatFormat:
    """The model's format with the request's variables. ApiError if it has none."""
    own = service.engine.prompt_format
    if own is None:
        raise ApiError(
            400,
            f"The model {service.engine.info.name!r} has no chat template, so its turns cannot be written. "
            "Send the whole prompt to /v1/completions or /generate.",
        )
    return with_request_variables(own, body.chat_template_kwargs, service, context)


def _choice(
    index: int, choice: Choice, prefix: str, tools: AskedTools | None, logprobs: ChatLogprobs | None
) -> ChatChoice:
    text, made = choice.text, []
    if tools and tools.specs:
        text, calls = read_calls(choice.text, tools.form)
        made = [tools.made(call) for call in calls]
    text = prefix + text
    return ChatChoice(
        index=index,
        message=CallingMessage(content=text or None, tool_calls=made)
        if made
        else AnswerMessage(content=text),
        logprobs=logprobs,
        finish_reason=_reason(choice, len(made)),
    )


def _reason(choice: Choice, num_calls: int) -> Literal["stop", "length", "content_filter", "tool_calls"]:
    return "tool_calls" if num_calls and choice.finish_reason == "stop" else choice.finish_reason


async def _choices(
    body: ChatRequest,
    own: ChatFormat,
    messages: Sequence[Message],
    tools: AskedTools | None,
    service: Service,
) -> list[Choice]:
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = sampling_params(body, service, max_new_tokens=1, logprobs=logprobs)
    if tools is not None and tools.specs and params.grammar is not None:
        raise ApiError(400, "tools and a form of the answer exclude each other; send one", param="tools")
    write = partial(
        chat_request if tools is None else tools.request,
        own=own,
        continues_last=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False,
    )
    # A checkpoint's own template is a program of others and may take its time.
    try:
        request = await asyncio.to_thread(write, service.engine, messages, params)
    except RequestError as error:
        raise ApiError(400, str(error), param="tools" if tools else "messages") from error
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
    tools: AskedTools | None,
) -> AsyncGenerator[dict[str, Any], None]:
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    tokenizer = service.engine.tokenizer
    started: set[int] = set()
    readers = [CallReader(tools.form) if tools and tools.specs else None for _ in choices]
    num_calls = [0] * len(choices)

    def chunk(
        index: int, delta: dict[str, object], logprobs: ChatLogprobs | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        shown = None if logprobs is None else logprobs.model_dump()
        part = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": reason}
        return identity.chunk(CHUNK, [part], **usage_in_chunks(body, choices, len(choices)))

    async with aclosing(screened.parts()) as parts:
        async for index, text, is_whole in parts:
            if index not in started:
                started.add(index)
                yield chunk(index, {"role": "assistant", "content": prefix, "refusal": None})
            calls: list[ToolCall] = []
            if (reader := readers[index]) is not None:
                text, calls = reader.push(text)
                text += reader.finish() if is_whole else ""
            if text:
                yield chunk(index, {"content": text}, _logprobs(body, choices[index], tokenizer))
            for call in calls:
                assert tools is not None
                made = {"index": num_calls[index], **tools.made(call).model_dump()}
                num_calls[index] += 1
                yield chunk(index, {"tool_calls": [made]})
            if is_whole:
                left = _logprobs(body, choices[index], tokenizer)  # of tokens that spell calls
                left = left if left and left.content else None
                yield chunk(index, {}, left, _reason(choices[index], num_calls[index]))
    if screened.guard is not None:
        more = usage_in_chunks(body, choices, len(choices))
        yield identity.chunk(CHUNK, [], **more, guard=screened.report)
    if with_usage:
        yield identity.chunk(CHUNK, [], usage=usage(choices, len(choices)).model_dump())
