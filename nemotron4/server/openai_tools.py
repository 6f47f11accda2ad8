"""Tools on ``/v1/chat/completions``: what a request asks, and the calls in its answers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemotron4.engine import ChatFormat, InferenceEngine, SamplingParams, SamplingRequest
from nemotron4.errors import RequestError
from nemotron4.records import JsonObject, Message
from nemotron4.server.context import ApiError
from nemotron4.text import tools as tool_texts
from nemotron4.text.answers import chat_request
from nemotron4.text.messages import CUSTOM_INPUT
from nemotron4.text.prompt import with_tools
from nemotron4.text.tools import ToolCall, ToolFormat


class _Given(BaseModel):
    # The nested objects have extras of other APIs (``cache_control``), which ask for nothing here.
    model_config = ConfigDict(strict=True, extra="ignore")


class _Spec(_Given):
    name: str = Field(min_length=1, max_length=200)
    description: str | None = None


class FunctionSpec(_Spec):
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionTool(_Given):
    type: Literal["function"]
    function: FunctionSpec

    @property
    def name(self) -> str:
        return self.function.name

    def spec(self) -> JsonObject:
        """As chat templates and grammars have it."""
        return self.model_dump(exclude_none=True)


class RegexOrLark(_Given):
    syntax: Literal["regex", "lark"]
    definition: str


class CustomFormat(_Given):
    type: Literal["text", "grammar"]
    grammar: RegexOrLark | None = None


class CustomSpec(_Spec):
    format: CustomFormat | None = None


class CustomTool(_Given):
    """A tool whose input is a text; models see a function with one argument."""

    type: Literal["custom"]
    custom: CustomSpec

    @property
    def name(self) -> str:
        return self.custom.name

    def spec(self) -> JsonObject:
        written: JsonObject = {"type": "string"}
        given = self.custom.format
        if given is not None and given.type == "grammar":
            if given.grammar is None or given.grammar.syntax != "regex":
                text = f"custom tool {self.name!r}: a format of type grammar needs one of syntax 'regex'"
                raise ApiError(400, text, param="tools")
            written["pattern"] = f"^(?:{given.grammar.definition})$"
        parameters = {
            "type": "object",
            "properties": {CUSTOM_INPUT: written},
            "required": [CUSTOM_INPUT],
            "additionalProperties": False,
        }
        function: JsonObject = {"name": self.name, "parameters": parameters, "strict": True}
        if self.custom.description is not None:
            function["description"] = self.custom.description
        return {"type": "function", "function": function}


Tool = Annotated[FunctionTool | CustomTool, Field(discriminator="type")]


class ToolName(_Given):
    name: str


class NamedFunction(_Given):
    type: Literal["function"]
    function: ToolName

    @property
    def name(self) -> str:
        return self.function.name


class NamedCustom(_Given):
    type: Literal["custom"]
    custom: ToolName

    @property
    def name(self) -> str:
        return self.custom.name


NamedTool = Annotated[NamedFunction | NamedCustom, Field(discriminator="type")]


class ToolSelection(_Given):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedTools(_Given):
    """All tools are shown, these may be called."""

    type: Literal["allowed_tools"]
    allowed_tools: ToolSelection


ToolChoice = Annotated[NamedFunction | NamedCustom | AllowedTools, Field(discriminator="type")]


class ToolFields(BaseModel):
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class FunctionCall(_Given):
    name: str
    arguments: str


class MadeFunctionCall(BaseModel):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class CustomCall(_Given):
    name: str
    input: str


class MadeCustomCall(BaseModel):
    """A call of a custom tool in an answer."""

    id: str
    type: Literal["custom"] = "custom"
    custom: CustomCall


MadeCall = MadeFunctionCall | MadeCustomCall


@dataclass(frozen=True)
class AskedTools:
    """What one request may call. ``specs`` is empty where only the conversation holds calls.

    ``allowed`` are those that a call may name, all or some of them; ``customs`` the names of custom tools.
    """

    form: ToolFormat
    specs: tuple[JsonObject, ...]
    allowed: tuple[JsonObject, ...]
    customs: frozenset[str]
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
                self.allowed,
                engine.tokenizer,
                is_required=self.is_required,
                is_parallel=self.is_parallel,
            )
            params = replace(params, grammar=wanted)
        own, messages = self.written(own, messages)
        return chat_request(engine, messages, params, own=own, **how)

    def made(self, call: ToolCall) -> MadeCall:
        """A call as an answer has it."""
        name = f"call_{uuid.uuid4().hex[:24]}"
        if call.name not in self.customs:
            return MadeFunctionCall(id=name, function=FunctionCall(name=call.name, arguments=call.arguments))
        text = json.loads(call.arguments).get(CUSTOM_INPUT)
        written = text if isinstance(text, str) else call.arguments  # of a call that no grammar held
        return MadeCustomCall(id=name, custom=CustomCall(name=call.name, input=written))

    def written(self, own: ChatFormat, messages: Sequence[Message]) -> tuple[ChatFormat, Sequence[Message]]:
        """The format and the messages that have the tools."""
        if tool_texts.knows_tools(own):
            return with_tools(own, self.specs, messages), messages  # type: ignore[arg-type]  # a PromptFormat
        return own, tool_texts.spelled(messages, self.specs, self.form)


def asked_tools(
    body: ToolFields, messages: Sequence[Message], own: ChatFormat, form_name: str | None
) -> AskedTools | None:
    """None for a conversation without tools and calls. ApiError for a choice that names no tool."""
    shown = [] if body.tool_choice == "none" else body.tools or []
    choice = body.tool_choice
    allowed: Sequence[FunctionTool | CustomTool] = shown
    if isinstance(choice, NamedFunction | NamedCustom):
        shown = allowed = _named(shown, [choice])
    elif isinstance(choice, AllowedTools):
        allowed = _named(shown, choice.allowed_tools.tools)
    if choice == "required" and not shown:
        raise ApiError(400, "tool_choice is required, and there are no tools", param="tool_choice")
    if not shown and not any("tool_calls" in message.more for message in messages):
        return None
    customs = frozenset(tool.name for tool in shown if isinstance(tool, CustomTool))
    if twice := sorted(customs & {tool.name for tool in shown if isinstance(tool, FunctionTool)}):
        raise ApiError(400, f"a custom tool and a function are both named {twice[0]!r}", param="tools")
    try:
        form = tool_texts.format_of(own, form_name)
    except RequestError as error:
        raise ApiError(400, error.message, param="tools") from error
    is_named = isinstance(choice, NamedFunction | NamedCustom)
    mode = choice.allowed_tools.mode if isinstance(choice, AllowedTools) else choice
    return AskedTools(
        form,
        tuple(tool.spec() for tool in shown),
        tuple(tool.spec() for tool in allowed),
        customs,
        is_required=mode == "required" or is_named,
        is_parallel=body.parallel_tool_calls is not False and not is_named,
    )


def _named(
    tools: Sequence[FunctionTool | CustomTool], names: Sequence[NamedFunction | NamedCustom]
) -> list[FunctionTool | CustomTool]:
    """The tools of these kinds and names, in their order; ApiError for a name that none of them has."""
    wanted = {(each.type, each.name) for each in names}
    found = [tool for tool in tools if (tool.type, tool.name) in wanted]
    missing = sorted(name for _, name in wanted - {(tool.type, tool.name) for tool in found})
    if missing:
        text = f"tool_choice names {missing[0]!r}, which is not among the tools"
        raise ApiError(400, text, param="tool_choice")
    return found
