"""Tools on ``/v1/chat/completions``: what a request asks, and the calls in its answers."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemotron4.engine import ChatFormat, InferenceEngine, SamplingParams, SamplingRequest
from nemotron4.errors import RequestError
from nemotron4.records import JsonObject, Message
from nemotron4.server.context import ApiError
from nemotron4.text import tools as tool_texts
from nemotron4.text.answers import chat_request
from nemotron4.text.prompt import with_tools
from nemotron4.text.tools import ToolCall, ToolFormat


class _Given(BaseModel):
    # The nested objects have extras of other APIs (``cache_control``), which ask for nothing here.
    model_config = ConfigDict(strict=True, extra="ignore")


class FunctionSpec(_Given):
    name: str = Field(min_length=1, max_length=200)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Given):
    type: Literal["function"]
    function: FunctionSpec


class FunctionName(_Given):
    name: str


class NamedTool(_Given):
    type: Literal["function"]
    function: FunctionName


class FunctionCall(_Given):
    name: str
    arguments: str


class ToolFields(BaseModel):
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class MadeCall(BaseModel):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall

    @classmethod
    def of(cls, call: ToolCall) -> MadeCall:
        function = FunctionCall(name=call.name, arguments=call.arguments)
        return cls(id=f"call_{uuid.uuid4().hex[:24]}", function=function)


@dataclass(frozen=True)
class AskedTools:
    """What one request may call. ``specs`` is empty where only the conversation holds calls."""

    form: ToolFormat
    specs: tuple[JsonObject, ...]
    is_required: bool
    is_parallel: bool

    def request(
        self,
        engine: InferenceEngine,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        own: ChatFormat,
        **how: Any,
    ) -> SamplingRequest:
        """The conversation with its tools, in the words of the model's template or of ``text.tools``."""
        if self.specs:
            wanted = tool_texts.grammar(
                self.form,
                self.specs,
                engine.tokenizer,
                is_required=self.is_required,
                is_parallel=self.is_parallel,
            )
            params = replace(params, grammar=wanted)
        own, messages = self.written(own, messages)
        return chat_request(engine, messages, params, own=own, **how)

    def written(self, own: ChatFormat, messages: Sequence[Message]) -> tuple[ChatFormat, Sequence[Message]]:
        """The format and the messages that have the tools."""
        if tool_texts.knows_tools(own):
            return with_tools(own, self.specs, messages), messages  # type: ignore[arg-type]  # a PromptFormat
        return own, tool_texts.spelled(messages, self.specs, self.form)


def asked_tools(
    body: ToolFields, messages: Sequence[Message], own: ChatFormat, form_name: str | None
) -> AskedTools | None:
    """None for a conversation without tools and calls. ApiError for a choice that names no tool."""
    given = [] if body.tool_choice == "none" else body.tools or []
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        given = [tool for tool in given if tool.function.name == choice.function.name]
        if not given:
            text = f"tool_choice names {choice.function.name!r}, which is not among the tools"
            raise ApiError(400, text, param="tool_choice")
    if choice == "required" and not given:
        raise ApiError(400, "tool_choice is required, and there are no tools", param="tool_choice")
    if not given and not any("tool_calls" in message.more for message in messages):
        return None
    try:
        form = tool_texts.format_of(own, form_name)
    except RequestError as error:
        raise ApiError(400, error.message, param="tools") from error
    return AskedTools(
        form,
        tuple(tool.model_dump(exclude_none=True) for tool in given),
        is_required=choice == "required" or isinstance(choice, NamedTool),
        is_parallel=body.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
    )
