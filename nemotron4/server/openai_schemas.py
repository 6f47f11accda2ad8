"""The bodies of the OpenAI routes, strictly typed. What the API knows and this server does not is refused.

A field that changes results and is not supported is refused by name; one that cannot change them is ignored;
one that nobody knows is refused with the nearest known name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from nemotron4.records import FieldError, Message
from nemotron4.server.openai_tools import MadeCall, ToolFields
from nemotron4.server.structured import StructuredFields
from nemotron4.text.messages import MESSAGE_SCHEMA, read_messages

MAX_CHOICES = 128
MAX_ROWS = 1024  # prompts times n
MAX_TOP_LOGPROBS = 20
# What a sampling field is when it is left out; the OpenAPI page says so as x-default.
DEFAULTS: Mapping[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
}

Ignored = Annotated[
    Any, Field(default=None, description="Accepted and ignored: it cannot change the answer.")
]


def _only(*neutral: object, instead: str = "") -> Any:
    """A field that is not supported; ``neutral`` values ask for nothing and pass, as null does.

    ``instead``: the field that does here what this one does at other servers.
    """

    def check(value: object) -> object:
        if value is not None and value not in neutral:
            allowed = " or ".join(json.dumps(each) for each in (*neutral, None))
            raise PydanticCustomError(
                "unsupported",
                "not supported by this server; {use}leave it out or send {allowed}",
                {"allowed": allowed, "use": f"here it is {instead}, so " if instead else ""},
            )
        return value

    return Annotated[
        Any,
        AfterValidator(check),
        WithJsonSchema({"enum": [None, *neutral], "description": "Not supported."}),
        Field(default=None),
    ]


def _sampling_field(name: str, **bounds: Any) -> Any:
    return Field(None, json_schema_extra={"x-default": DEFAULTS[name]}, **bounds)


Strings = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]
IdLists = Annotated[list[Ids], Field(fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(
        None, description="vLLM's: with include_usage, in each chunk."
    )
    include_obfuscation: Ignored


class _Sampling(StructuredFields, _Strict):
    """What completions and chat have in common. Unknown fields: see ``ServerSettings.unknown_fields``."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = Field(None, description="The name that /v1/models gives, or left out.")
    frequency_penalty: float | None = _sampling_field("frequency_penalty", ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    presence_penalty: float | None = _sampling_field("presence_penalty", ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[Strings, Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = _sampling_field("temperature", ge=0, le=2)
    top_p: float | None = _sampling_field("top_p", ge=0, le=1)
    # Beyond OpenAI's own, under the names that other open servers use.
    top_k: int | None = _sampling_field("top_k", ge=-1, lt=2**31)  # -1 is off, like 0
    min_p: float | None = _sampling_field("min_p", ge=0, le=1)
    repetition_penalty: float | None = _sampling_field("repetition_penalty", ge=0.01, le=100)
    min_tokens: int | None = _sampling_field("min_tokens", ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=1, description="Keep so many at the prompt's end.")
    spaces_between_special_tokens: Ignored
    user: Ignored
    metadata: Ignored
    store: Ignored
    # What changes an answer at vLLM, llama.cpp, SGLang, TGI or Ollama.
    allowed_token_ids: _only([])  # type: ignore[valid-type]
    bad_words: _only([])  # type: ignore[valid-type]
    logits_processors: _only([])  # type: ignore[valid-type]
    use_beam_search: _only(False)  # type: ignore[valid-type]
    num_beams: _only(1)  # type: ignore[valid-type]
    length_penalty: _only(1)  # type: ignore[valid-type]
    prompt_logprobs: _only(instead="echo with logprobs, of /v1/completions")  # type: ignore[valid-type]
    return_token_ids: _only(False)  # type: ignore[valid-type]
    return_tokens_as_token_ids: _only(False)  # type: ignore[valid-type]
    n_predict: _only(-1, instead="max_tokens")  # type: ignore[valid-type]
    max_new_tokens: _only(instead="max_tokens")  # type: ignore[valid-type]
    max_output_tokens: _only(instead="max_tokens")  # type: ignore[valid-type]
    min_new_tokens: _only(0, instead="min_tokens")  # type: ignore[valid-type]
    do_sample: _only(True, instead="temperature")  # type: ignore[valid-type]
    repeat_penalty: _only(1, instead="repetition_penalty")  # type: ignore[valid-type]
    typical_p: _only(1)  # type: ignore[valid-type]
    mirostat: _only(0)  # type: ignore[valid-type]
    regex: _only(instead="guided_regex")  # type: ignore[valid-type]
    ebnf: _only(instead="guided_grammar")  # type: ignore[valid-type]
    stop_regex: _only([])  # type: ignore[valid-type]


class CompletionRequest(_Sampling):
    """``POST /v1/completions``."""

    prompt: str | Strings | Ids | IdLists
    best_of: int | None = Field(None, description="Not supported: leave it out or send 1.")
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    add_special_tokens: bool | None = Field(None, description="False leaves BOS out of a text.")
    prompt_embeds: _only()  # type: ignore[valid-type]
    suffix: _only("")  # type: ignore[valid-type]


def _messages(value: object) -> tuple[Message, ...]:
    try:
        return read_messages(value, "messages")
    except FieldError as error:
        raise PydanticCustomError(
            "message", "{text}", {"text": str(error).removeprefix("messages")}
        ) from error


Messages = Annotated[
    tuple[Message, ...],
    PlainValidator(_messages),
    WithJsonSchema({"type": "array", "minItems": 1, "items": MESSAGE_SCHEMA}),
]


class ChatRequest(ToolFields, _Sampling):
    """``POST /v1/chat/completions``."""

    messages: Messages
    continue_final_message: bool | None = Field(
        None, description="The last message, an assistant's, is the beginning of the answer."
    )
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's own chat template."
    )
    echo: bool | None = Field(None, description="With continue_final_message: the answer begins with it.")
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    service_tier: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored
    prompt_cache_retention: Ignored
    add_special_tokens: _only(False)  # type: ignore[valid-type]
    chat_template: _only()  # type: ignore[valid-type]
    documents: _only([], instead="chat_template_kwargs.documents")  # type: ignore[valid-type]
    functions: _only([])  # type: ignore[valid-type]
    function_call: _only("none", "auto")  # type: ignore[valid-type]
    modalities: _only(["text"])  # type: ignore[valid-type]
    audio: _only()  # type: ignore[valid-type]
    prediction: _only()  # type: ignore[valid-type]
    web_search_options: _only()  # type: ignore[valid-type]
    reasoning_effort: _only("none")  # type: ignore[valid-type]
    verbosity: _only()  # type: ignore[valid-type]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Counted in tokens; the prompt counts once, however many choices were asked for."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class GuardVerdict(BaseModel):
    verdict: Literal["safe", "unsafe", "unparsed", "failed"]
    categories: list[str]


class GuardReport(BaseModel):
    """What the content guard found; only in the answers of a server that has one."""

    prompts: list[GuardVerdict]
    answers: list[GuardVerdict]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter"] | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    guard: GuardReport | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprobs]
    refusal: None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class CallingMessage(BaseModel):
    """An answer that calls tools; ``content`` is the text before the calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[MadeCall]


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage | CallingMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "content_filter", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    guard: GuardReport | None = None


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nemotron4"
    context_length: int
    max_model_len: int = Field(description="The same, as vLLM calls it.")
    parent: str | None = Field(None, description="The base of an adapter.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


_STATUSES = {
    400: "The request cannot be served, and why.",
    401: "The API key is missing or wrong.",
    403: "The Host header names somebody else.",
    404: "The model is not served here.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "A defect of the server.",
    503: "The server is shutting down.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text} for status, text in _STATUSES.items()
}
