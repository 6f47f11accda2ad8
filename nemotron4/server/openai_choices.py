"""From the fields of an OpenAI request to the engine's parameters, and from its steps to judged choices."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel
from starlette.responses import Response

from nemotron4.engine import ChatFormat, PositionLogprobs, SamplingParams, SamplingRequest, Tokenizer
from nemotron4.errors import unknown_name
from nemotron4.records import JsonObject, Message
from nemotron4.server.context import ApiError, RequestContext
from nemotron4.server.guard import Guard, Screening, report
from nemotron4.server.openai_schemas import (
    DEFAULTS,
    MAX_ROWS,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    GuardReport,
    PromptTokensDetails,
    Usage,
)
from nemotron4.server.rows import check_length, steps, usable_temperature
from nemotron4.server.settings import Service
from nemotron4.server.structured import grammar_of
from nemotron4.text.answers import AnswerText, samples
from nemotron4.text.prompt import with_variables

LEAST_LOGPROB = -9999.0  # OpenAI's number for "cannot happen"; JSON has no infinity
LEAST_TOP_P = 1e-9  # OpenAI's top_p may be 0: only the most likely token


@dataclass(frozen=True)
class Identity:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> Identity:
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)

    def chunk(self, kind: str, choices: list[dict[str, Any]], **more: object) -> dict[str, Any]:
        """One event of a stream."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices, **more}


@dataclass
class Choice:
    """One answer, and how many of its tokens were handed out."""

    answer: AnswerText
    num_reported: int = 0
    is_blocked: bool = False  # by the guard: neither text nor tokens leave the server

    @property
    def text(self) -> str:
        return "" if self.is_blocked else self.answer.text

    @property
    def finish_reason(self) -> Literal["stop", "length", "content_filter"]:
        if self.is_blocked:
            return "content_filter"
        return "stop" if self.answer.finish_reason == "stop" else "length"

    def take_tokens(self) -> range:
        """Numbers of the tokens whose text was handed out since the last call.

        The tokens that spell a stop string or end the turn are in no text and so never among them.
        """
        if self.is_blocked:
            return range(0)
        start, starts = self.num_reported, self.answer.starts
        while self.num_reported < len(starts) and starts[self.num_reported] < len(self.answer.text):
            self.num_reported += 1
        return range(start, self.num_reported)


def sampling_params(
    body: CompletionRequest | ChatRequest,
    service: Service,
    *,
    max_new_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """What the client asked for; ``text.answers`` adds what ends an answer of this model."""

    def given(name: str) -> float:
        value: float | None = getattr(body, name)
        return DEFAULTS[name] if value is None else value

    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=usable_temperature(given("temperature")),
        top_k=max(0, int(given("top_k"))),
        top_p=max(given("top_p"), LEAST_TOP_P),
        min_p=given("min_p"),
        repetition_penalty=given("repetition_penalty"),
        presence_penalty=given("presence_penalty"),
        frequency_penalty=given("frequency_penalty"),
        logit_bias=_logit_bias(body.logit_bias or {}, service.engine.info.vocab_size),
        min_new_tokens=int(given("min_tokens")),
        stop_strings=user_stops(body),
        stop_token_ids=frozenset(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        shows_stop=bool(body.include_stop_str_in_output),
        shows_special=body.skip_special_tokens is False,
        grammar=grammar_of(body),
        adapter=service.adapter_of(body.model),
        seed=None if body.seed is None else body.seed % 2**63,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _logit_bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            text = f"logit_bias: {name[:40]!r} is not a token id; expected '0' to '{vocab_size - 1}'"
            raise ApiError(400, text, param="logit_bias")
        bias[int(name)] = value
    return bias


def check_request(body: CompletionRequest | ChatRequest, service: Service, context: RequestContext) -> None:
    """Refuse what the types of single fields cannot tell, and warn of fields that nobody knows."""
    warn_of_unknown(body, service, context)
    check_model(body.model, service)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options is allowed only with stream: true", param="stream_options")
    for stop in user_stops(body):
        if not stop:
            raise ApiError(400, "stop: an empty string cannot be a stop string", param="stop")


def warn_of_unknown(
    body: BaseModel, service: Service, context: RequestContext, *, also_known: Collection[str] = ()
) -> None:
    """Fields that nobody knows."""
    for name in [name for name in body.model_extra or () if name not in also_known]:
        message, hint = unknown_name("field", name[:60], type(body).model_fields)
        pass_over(message, service, context, param=name[:60], hint=f"; {hint}")


def pass_over(
    message: str,
    service: Service,
    context: RequestContext,
    *,
    param: str,
    hint: str = "",
    ignored: str = "is ignored",
) -> None:
    """What nobody reads: a warning, or ApiError, as the operator says."""
    if service.settings.unknown_fields == "refuse":
        raise ApiError(400, message + hint, param=param, code="unknown_parameter")
    context.warnings.append(f"{message} {ignored}")


def with_request_variables(
    own: ChatFormat, variables: Mapping[str, Any] | None, service: Service, context: RequestContext
) -> ChatFormat:
    """The model's format with ``chat_template_kwargs``; others than its template reads are passed over."""
    own, unread = with_variables(own, variables or {})  # type: ignore[arg-type]  # a PromptFormat
    for name in unread:
        message = f"chat_template_kwargs: {name[:60]!r} is no variable of the model's chat template"
        pass_over(message, service, context, param="chat_template_kwargs", ignored="and is ignored")
    return own


def check_model(name: str | None, service: Service) -> str:
    """The name that answers carry; ApiError 404 for a model that is not served."""
    if name is not None and name not in service.model_names:
        raise model_not_found(name, service)
    return name or service.model_names[0]


def model_not_found(name: str, service: Service) -> ApiError:
    known = " and ".join(map(repr, service.model_names))
    text = f"The model {name[:100]!r} is not served here; this server has {known}."
    return ApiError(404, text, param="model", code="model_not_found")


def fitted(
    request: SamplingRequest, body: CompletionRequest | ChatRequest, limit: int | None, service: Service
) -> SamplingRequest:
    """The request cut to ``truncate_prompt_tokens`` and to so many new tokens; None is all there is room for.

    More than there is room for are refused, or clipped if the operator says so.
    """
    if body.truncate_prompt_tokens is not None:
        request = replace(request, prompt_ids=request.prompt_ids[-body.truncate_prompt_tokens :])
    room = service.engine.info.context_length - len(request.prompt_ids)
    if limit is None or (service.settings.clips_max_tokens and limit > room > 0):
        check_length(service.engine, len(request.prompt_ids), 1, param="messages")
        limit = room
    check_length(service.engine, len(request.prompt_ids), limit, param="max_tokens")
    return replace(request, params=replace(request.params, max_new_tokens=limit))


def user_stops(body: CompletionRequest | ChatRequest) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def choices_for(requests: Sequence[SamplingRequest], n: int, tokenizer: Tokenizer) -> list[Choice]:
    """``n`` choices for each request, each with a seed of its own; OpenAI's order of choices."""
    if len(requests) * n > MAX_ROWS:
        text = f"{len(requests)} prompts with n {n} make {len(requests) * n} answers; the limit is {MAX_ROWS}"
        raise ApiError(400, text, param="n")
    return [Choice(AnswerText(tokenizer, sample)) for request in requests for sample in samples(request, n)]


async def run_choices(
    choices: Sequence[Choice], service: Service, context: RequestContext
) -> AsyncGenerator[tuple[int, str, bool], None]:
    """(number of the choice, text that can be sent, whether it is whole) of every token."""
    rows = [choice.answer.request for choice in choices]
    async with aclosing(steps(service.engine, rows, context, service.metrics)) as events:
        async for index, step in events:
            yield index, choices[index].answer.push(step), step.finish_reason is not None


async def run_to_end(choices: Sequence[Choice], service: Service, context: RequestContext) -> None:
    async with aclosing(run_choices(choices, service, context)) as events:
        async for _ in events:
            pass


def usage(choices: Sequence[Choice], n: int) -> Usage:
    num_prompt = sum(len(choice.answer.request.prompt_ids) for choice in choices[::n])
    num_new = sum(len(choice.answer.token_ids) for choice in choices)
    num_cached = sum(choice.answer.num_cached for choice in choices[::n])
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_new,
        total_tokens=num_prompt + num_new,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached),
    )


def usage_in_chunks(body: CompletionRequest | ChatRequest, choices: Sequence[Choice], n: int) -> JsonObject:
    """The field of a chunk with choices: null before the last one has it, or so far, as the client asks."""
    options = body.stream_options
    if options is None or not options.include_usage:
        return {}
    return {"usage": usage(choices, n).model_dump() if options.continuous_usage_stats else None}


def token_name(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int]]:
    """Text and bytes of one token; a control piece, which has none, goes by its name."""
    data = tokenizer.token_bytes(token_id)
    if not data:
        return tokenizer.piece(token_id), []
    return data.decode("utf-8", errors="replace"), list(data)


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def positions_of(choice: Choice, numbers: range) -> list[PositionLogprobs]:
    return [choice.answer.logprobs[number] for number in numbers]


class Screened:
    """One request's choices. ``conversations`` has the prompt of each choice, as messages.

    ``prefill``: the last message, with which each answer begins.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        conversations: Sequence[Sequence[Message]],
        service: Service,
        context: RequestContext,
        *,
        prefill: str = "",
    ) -> None:
        self._choices = choices
        self._prefill = prefill
        self._conversations = conversations
        self._service = service
        self._context = context
        self._prompts: list[Screening] = []
        self._answers: list[Screening] = []

    @property
    def guard(self) -> Guard | None:
        return self._service.guard

    @property
    def report(self) -> dict[str, object]:
        return report(self._prompts, self._answers)

    def response(self, answer: ChatCompletion | Completion) -> Response:
        """The answer, with what the guard found if there is one."""
        if self.guard is None:
            return Response(answer.model_dump_json(exclude={"guard"}), media_type="application/json")
        answer.guard = GuardReport.model_validate(self.report)
        return Response(answer.model_dump_json(), media_type="application/json")

    async def run(self) -> None:
        """Prompts judged, choices whole, answers judged."""
        async with aclosing(self.parts()) as parts:
            async for _ in parts:
                pass

    async def parts(self) -> AsyncGenerator[tuple[int, str, bool], None]:
        """As ``run_choices``. A blocking guard gives each choice in one part, after its judgment."""
        guard = self.guard
        if guard is None:
            async with aclosing(run_choices(self._choices, self._service, self._context)) as parts:
                async for part in parts:
                    yield part
            return
        prompts = list(dict.fromkeys(map(tuple, self._conversations)))
        self._prompts = await guard.screen_prompts(prompts, self._context, self._service.metrics)
        if guard.is_blocking:
            await run_to_end(self._choices, self._service, self._context)
            await self._judge(guard)
            for index, choice in enumerate(self._choices):
                yield index, choice.text, True
            return
        async with aclosing(run_choices(self._choices, self._service, self._context)) as parts:
            async for part in parts:
                yield part
        await self._judge(guard)

    async def _judge(self, guard: Guard) -> None:
        pairs = zip(self._conversations, self._choices, strict=True)
        answers = [
            (conversation[:-1] if self._prefill else conversation, self._prefill + choice.answer.text)
            for conversation, choice in pairs
        ]
        self._answers = await guard.screen_answers(answers, self._context, self._service.metrics)
        for choice, screening in zip(self._choices, self._answers, strict=True):
            choice.is_blocked = guard.is_refused(screening)
