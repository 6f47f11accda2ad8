"""The tokenizer over HTTP, as vLLM has it, for clients that count tokens or render templates themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from nemotron4.records import Message
from nemotron4.server.context import ApiError, RequestContext, context_of
from nemotron4.server.openai_choices import check_model, warn_of_unknown, with_request_variables
from nemotron4.server.openai_schemas import ERRORS, Messages
from nemotron4.server.openai_tools import ToolFields, asked_tools
from nemotron4.server.settings import Service
from nemotron4.text.answers import chat_format, encode_chat, encode_text, text_with_markers


class TokenizeRequest(ToolFields):
    """A text or a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="False leaves BOS out of a text.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class DetokenizeResponse(BaseModel):
    prompt: str


def _ids(body: TokenizeRequest, service: Service, context: RequestContext) -> list[int]:
    engine = service.engine
    if body.messages is not None:
        messages: Sequence[Message] = body.messages
        own = with_request_variables(chat_format(engine), body.chat_template_kwargs, service, context)
        if tools := asked_tools(body, messages, own, service.settings.tool_format):
            own, messages = tools.written(own, messages)
        return encode_chat(
            engine,
            messages,
            own=own,
            continues_last=bool(body.continue_final_message),
            add_generation_prompt=body.add_generation_prompt is not False,
        )
    assert body.prompt is not None
    is_bare = body.add_special_tokens is False
    return engine.tokenizer.encode(body.prompt) if is_bare else encode_text(engine, body.prompt)


def tokenizer_routes(service: Service) -> APIRouter:
    router = APIRouter()
    engine = service.engine

    @router.post("/tokenize", responses=ERRORS)
    async def post_tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
        """Token ids of a text or of a conversation in the model's own format."""
        context = context_of(request.scope)
        warn_of_unknown(body, service, context)
        check_model(body.model, service)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        ids = await asyncio.to_thread(_ids, body, service, context)
        names = list(map(engine.tokenizer.piece, ids)) if body.return_token_strs else None
        return TokenizeResponse(
            count=len(ids), max_model_len=engine.info.context_length, tokens=ids, token_strs=names
        )

    @router.post("/detokenize", responses=ERRORS)
    async def post_detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeResponse:
        """The text of token ids, control pieces by name, as vLLM has them."""
        warn_of_unknown(body, service, context_of(request.scope))
        check_model(body.model, service)
        outside = next((i for i in body.tokens if i >= engine.tokenizer.vocab_size), None)
        if outside is not None:
            raise ApiError(400, f"tokens: id {outside} is outside the vocabulary", param="tokens")
        text = await asyncio.to_thread(text_with_markers, engine.tokenizer, body.tokens)
        return DetokenizeResponse(prompt=text)

    @router.get("/tokenizer_info")
    async def get_tokenizer_info() -> dict[str, Any]:
        """Special tokens and the chat template, by the names of ``tokenizer_config.json``."""
        tokenizer, own = engine.tokenizer, engine.prompt_format
        ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": engine.info.context_length,
            "add_bos_token": engine.info.adds_bos,
            **{name: None if i is None else tokenizer.piece(i) for name, i in ends.items()},
            "additional_special_tokens": list(tokenizer.markers),
            "chat_template": None if own is None else own.template,
        }

    return router
