"""``PUT /generate``, which the card's client was written for: NeMo's semantics on top of the engine.

Source: NeMo v2.0.0rc0, ``text_generation_utils.py`` and ``text_generation_strategy.py``.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nemotron4.engine import PositionLogprobs, SamplingParams, SamplingRequest, Tokenizer, derive_seed
from nemotron4.records import Message
from nemotron4.server.context import ApiError, RequestContext, context_of, json_response, json_text
from nemotron4.server.guard import header, refusal
from nemotron4.server.nemo_request import (
    END_OF_TEXT,
    GENERATE_DOCUMENTATION,
    NemoRequest,
    RefusalError,
    parse,
)
from nemotron4.server.rows import check_length, collect, text_ids, until_disconnect, usable_temperature
from nemotron4.server.settings import Service
from nemotron4.text.answers import AnswerText, continuation, end_ids

MARKER = "<extra_id_1>"
# Larger answers are put together outside the event loop, so that nobody else waits for them. For a small one
# the way to a thread and back takes longer.
INLINE_TOKENS = 1000


async def generate(
    request: NemoRequest, service: Service, context: RequestContext
) -> tuple[bytes, dict[str, str]]:
    """The answer of ``PUT /generate`` as JSON, and its headers: what a guard found, if there is one.

    ApiError for what NeMo crashes on or never ends with, and for what the guard refuses.
    """
    tokenizer = service.engine.tokenizer
    prompts = await _prompts(tokenizer, request)
    max_len = max(map(len, prompts))
    check_length(service.engine, max_len, request.tokens_to_generate, param="tokens_to_generate")
    final_length = max_len + request.tokens_to_generate
    if request.compute_logprob and request.all_probs:
        _check_full_logprobs(service, len(prompts), final_length)
    eos_id = end_of_text_id(service)
    stop_ids, stop_strings = stops(tokenizer, request.end_strings, eos_id)
    rows = []
    for index, ids in enumerate(prompts):
        params = _params(request, service, eos_id, stop_ids, stop_strings, index, final_length - len(ids))
        rows.append(SamplingRequest(tuple(ids), params))
    talks = [[Message("user", text)] for text in request.sentences]
    guard = service.guard
    if guard is not None:
        prompt_screenings = await guard.screen_prompts(talks, context, service.metrics)
    results = await collect(service.engine, rows, context, service.metrics)
    headers: dict[str, str] = {}
    if guard is not None:
        texts = [tokenizer.decode(result.token_ids) for result in results]
        screenings = await guard.screen_answers(
            list(zip(talks, texts, strict=True)), context, service.metrics
        )
        for index, screening in enumerate(screenings):
            if guard.is_refused(screening):
                raise refusal(screening, f"The answer to sentence {index + 1} of {len(texts)}")
        headers = header(prompt_screenings, screenings)
    put_together = partial(_answer, request, tokenizer, eos_id, results)
    if len(rows) * final_length <= INLINE_TOKENS and not request.all_probs:
        return put_together(), headers
    return await asyncio.to_thread(put_together), headers


def end_of_text_id(service: Service) -> int:
    """The id that ends a row and fills it up: the tokenizer's, else the checkpoint's first."""
    known = end_ids(service.engine)
    own = (service.engine.tokenizer.eos_id, *service.engine.info.eos_token_ids)
    found = next((token_id for token_id in own if token_id in known), None)
    if found is None:
        raise ApiError(400, "this model names no end-of-text token, which /generate needs to fill rows up")
    return found


def stops(
    tokenizer: Tokenizer, end_strings: Sequence[str], eos_id: int
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Stop ids and the strings that a row is tested to end with.

    A string is a stop id if, right behind ``<extra_id_1>``, it adds exactly one id; else it is a string.
    """
    if not end_strings or list(end_strings) == [END_OF_TEXT]:
        return frozenset({eos_id}), ()
    ids, strings = {eos_id}, []
    before = tokenizer.encode(MARKER)
    for text in end_strings:
        if text == END_OF_TEXT:
            continue
        behind = tokenizer.encode(MARKER + text)
        if len(behind) == len(before) + 1 and behind[:-1] == before:
            ids.add(behind[-1])
        else:
            strings.append(text)
    return frozenset(ids), tuple(strings)


async def _prompts(tokenizer: Tokenizer, request: NemoRequest) -> list[list[int]]:
    start: list[int] = []
    if request.add_BOS:
        if tokenizer.bos_id is None:
            raise ApiError(400, "add_BOS is true, but this model's tokenizer has no beginning-of-text token")
        start = [tokenizer.bos_id]
    prompts = [start + ids for ids in await text_ids(tokenizer.encode, request.sentences)]
    if not all(prompts):
        raise ApiError(400, "sentences must not hold an empty string unless add_BOS is true")
    return prompts


def _check_full_logprobs(service: Service, num_rows: int, length: int) -> None:
    limit = service.settings.max_full_logprob_values
    needed = num_rows * length * service.engine.info.vocab_size
    if needed > limit:
        raise ApiError(
            400,
            f"all_probs over {num_rows} x {length} tokens and {service.engine.info.vocab_size} vocabulary "
            f"entries makes up to {needed} numbers; the limit is {limit}. Ask for fewer tokens or sentences.",
        )


def _params(
    request: NemoRequest,
    service: Service,
    eos_id: int,
    stop_ids: frozenset[int],
    stop_strings: tuple[str, ...],
    index: int,
    max_new_tokens: int,
) -> SamplingParams:
    is_penalised = service.settings.nemo_compat == "fixed" and not request.greedy
    is_scored = request.compute_logprob
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=0.0 if request.greedy else usable_temperature(request.temperature),
        top_k=min(math.floor(request.top_k), service.engine.info.vocab_size),
        top_p=request.top_p or 1.0,  # 0 means off, like 1
        repetition_penalty=float(request.repetition_penalty or 1.0) if is_penalised else 1.0,
        min_new_tokens=min(request.min_tokens_to_generate, max_new_tokens),
        min_tokens_masks=frozenset({eos_id}),
        stop_token_ids=stop_ids,
        stop_strings=stop_strings,
        stop_scope="row_suffix",
        seed=derive_seed(request.random_seed, index),
        logprobs=0 if is_scored else None,
        prompt_logprobs=0 if is_scored else None,
        full_logprobs=is_scored and request.all_probs,
    )


def _answer(
    request: NemoRequest,
    tokenizer: Tokenizer,
    eos_id: int,
    results: Sequence[AnswerText],
) -> bytes:
    token_ids = [[*result.request.prompt_ids, *result.token_ids] for result in results]
    sentences = [
        sent + continuation(tokenizer, result.request.prompt_ids, result.token_ids)
        for sent, result in zip(request.sentences, results, strict=True)
    ]
    length = max(map(len, token_ids))
    token_ids = [ids + [eos_id] * (length - len(ids)) for ids in token_ids]
    tokens = [[tokenizer.piece(token_id) for token_id in ids] for ids in token_ids]
    response: dict[str, Any] = {
        "sentences": sentences,
        "tokens": tokens,
        "token_ids": token_ids,
        "offsets": [list(_offsets(pieces)) for pieces in tokens],
        "logprob": None,
    }
    if request.compute_logprob:
        response["logprob"] = [_logprobs(result, length) for result in results]
    text = json_text(response)
    if not request.all_probs:
        return text
    full = b"null"
    if request.compute_logprob:
        full = b",".join(_full_logprobs(result, length, eos_id) for result in results)
        full = b"[" + full + b"]"
    # The first key in the order of sorted keys.
    return b'{"full_logprob":' + full + b"," + text[1:]


def _offsets(pieces: Sequence[str]) -> Iterator[int]:
    offset = 0
    for piece in pieces:
        yield offset
        offset += len(piece)


def _positions(result: AnswerText) -> list[PositionLogprobs]:
    return [*result.prompt_logprobs, *result.logprobs]


def _logprobs(result: AnswerText, length: int) -> list[float]:
    """Entry j belongs to token j + 1. What fills a row up is certain: log 1."""
    values = [float(position.chosen.logprob) for position in _positions(result)]
    return values + [0.0] * (length - 1 - len(values))


def _full_logprobs(result: AnswerText, length: int, eos_id: int) -> bytes:
    """JSON of a row, position by position: the encoder holds everybody else up while it writes one."""
    width, texts = 0, []
    for position in _positions(result):
        assert position.full is not None, "the engine left full_logprobs out"
        width = len(position.full)
        texts.append(json_text(list(position.full)).rstrip())
    filling = [-math.inf] * width
    filling[eos_id] = 0.0
    texts += [json_text(filling).rstrip()] * (length - 1 - len(texts))
    return b"[" + b",".join(texts) + b"]"


NOT_JSON_TYPE = (
    "Did not attempt to load JSON data because the request Content-Type was not 'application/json'."
)
NOT_JSON = "The browser (or proxy) sent a request that this server could not understand."


def nemo_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.put("/generate", **GENERATE_DOCUMENTATION)
    async def put_generate(request: Request) -> Response:
        context = context_of(request.scope)
        if not _is_json(request.headers.get("content-type", "")):
            return _message(NOT_JSON_TYPE, 415)
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            return _message(NOT_JSON, 400)
        try:
            checked = parse(body)
        except RefusalError as refusal:
            status = 400 if service.settings.nemo_compat == "fixed" else refusal.status
            return json_response(refusal.text, status)
        work = generate(checked, service, context)
        answer, headers = await until_disconnect(request.receive, work)
        return Response(answer, headers=headers, media_type="application/json")

    return router


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _message(text: str, status: int) -> Response:
    """flask-restful's form of an error."""
    return Response(json.dumps({"message": text}) + "\n", status, media_type="application/json")
