"""Tools that a model may call: how its format writes them, and calls read back from what it wrote.

Four forms of calls, as the models were trained:

    hermes    <tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>        Hermes, Qwen
    llama3    {"name": ..., "parameters": {...}}                                  Llama 3.1 and later
    nemotron  <TOOLCALL>[{"name": ..., "arguments": {...}}]</TOOLCALL>            Nemotron
    mistral   [TOOL_CALLS][{"name": ..., "arguments": {...}}]                     Mistral

A format whose template knows no tools, as Nemotron-4's, gets them in its system turn, in nemotron's form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemotron4.engine import ChatFormat, Grammar, Tokenizer
from nemotron4.errors import RequestError, unknown_name
from nemotron4.records import JsonObject, Message
from nemotron4.text import structured_output

MAX_CALLS = 16
INSTRUCTIONS = (
    "You can call functions. These are available:\n<AVAILABLE_TOOLS>{tools}</AVAILABLE_TOOLS>\n"
    'To call one or more, write <TOOLCALL>[{{"name": NAME, "arguments": {{...}}}}, ...]</TOOLCALL> and '
    "nothing else. What they return follows as <TOOL_RESPONSE>[...]</TOOL_RESPONSE>. Call a function only if "
    "you need it; else answer."
)


@dataclass(frozen=True)
class ToolCall:
    """``arguments`` is a JSON object as text, as in OpenAI's API."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat:
    """How calls are written. ``is_list``: all calls in one JSON list between opening and closing."""

    name: str
    opening: str
    closing: str
    is_list: bool
    arguments: str = "arguments"
    may_be_bare: bool = False  # the opening is a token that is not in the text, or there is none

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as a model would have written them."""
        texts = [
            json.dumps({"name": call.name, self.arguments: json.loads(call.arguments)}, ensure_ascii=False)
            for call in calls
        ]
        if self.is_list:
            return f"{self.opening}[{', '.join(texts)}]{self.closing}"
        return "\n".join(f"{self.opening}{text}{self.closing}" for text in texts)


FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat("hermes", "<tool_call>\n", "\n</tool_call>", is_list=False),
    "llama3": ToolFormat("llama3", "", "", is_list=False, arguments="parameters", may_be_bare=True),
    "nemotron": ToolFormat("nemotron", "<TOOLCALL>", "</TOOLCALL>", is_list=True),
    "mistral": ToolFormat("mistral", "[TOOL_CALLS]", "", is_list=True, may_be_bare=True),
}
# What of a template tells its form.
_SIGNS = (
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("<TOOLCALL>", "nemotron"),
    ("<|python_tag|>", "llama3"),
    ('"parameters"', "llama3"),
)


def knows_tools(own: ChatFormat) -> bool:
    """Whether the model's own template writes tools."""
    template = getattr(own, "template", "")
    return "tools" in template and hasattr(getattr(own, "writer", None), "tools")


def format_of(own: ChatFormat, name: str | None = None) -> ToolFormat:
    """The form of calls: by its name, else by what the model's template writes, else nemotron's."""
    if name is not None:
        if name not in FORMATS:
            message, hint = unknown_name("tool format", name, FORMATS)
            raise RequestError(message, hint=hint)
        return FORMATS[name]
    template = getattr(own, "template", "") if knows_tools(own) else ""
    return FORMATS[next((form for sign, form in _SIGNS if sign in template), "nemotron")]


# -- in: the conversation ----------------------------------------------------------------------------------


def spelled(messages: Sequence[Message], tools: Sequence[JsonObject], form: ToolFormat) -> list[Message]:
    """The conversation with tools, calls and results as text, for a format whose template knows none."""
    made = [_spelled(message, form) for message in messages]
    if not tools:
        return made
    text = INSTRUCTIONS.format(tools=json.dumps([_function(tool) for tool in tools], ensure_ascii=False))
    if made and made[0].role == "system":
        return [replace(made[0], content=f"{made[0].content}\n\n{text}".lstrip()), *made[1:]]
    return [Message("system", text), *made]


def _spelled(message: Message, form: ToolFormat) -> Message:
    calls = message.more.get("tool_calls") if message.role == "assistant" else None
    if calls:
        written = form.write([_call(each) for each in calls])
        return Message(message.role, f"{message.content}\n{written}".lstrip(), trains=message.trains)
    if message.role == "tool":
        return Message("tool", f"<TOOL_RESPONSE>[{message.content}]</TOOL_RESPONSE>", trains=message.trains)
    return message


def _call(given: Mapping[str, Any]) -> ToolCall:
    function = given.get("function", given)
    arguments = function.get("arguments", {})
    return ToolCall(
        function["name"],
        arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    )


def _function(tool: Mapping[str, Any]) -> JsonObject:
    function: JsonObject = dict(tool.get("function", tool))
    return function


# -- what may be written -----------------------------------------------------------------------------------


def grammar(
    form: ToolFormat,
    tools: Sequence[JsonObject],
    tokenizer: Tokenizer,
    *,
    is_required: bool,
    is_parallel: bool = True,
) -> Grammar:
    """Text and calls, or calls alone; the arguments of each fit its tool's schema.

    A schema that cannot be followed leaves any JSON object, unless its tool is ``strict``: RequestError then.
    """
    rules = [_tool_rule(i, _function(tool), form) for i, tool in enumerate(tools)]
    any_tool = " | ".join(f"tool_{i}" for i in range(len(tools)))
    more = f"{{0,{MAX_CALLS - 1}}}"
    closing = _quoted(form.closing)
    calls = "call"
    if form.is_list:
        body = '"[" any ' + (f'(", " any){more} ' if is_parallel else "") + f'"]" {closing}'
    else:
        body = f"any {closing}"
        calls += f' ("\\n" call){more}' if is_parallel else ""
    opening = _opening(form, tokenizer)
    if is_required:
        start = [f"start: {calls}", f"call: {opening} {body}"]
    elif not form.opening or opening.startswith("<["):
        # The first character, or a marker that is one token, tells a call from text.
        start = [f"start: {calls} | " + r"/([^{\[](.|\n)*)?/", f"call: {opening} {body}"]
    else:
        sequence = "(call)*" if is_parallel else "call?"
        rest = _quoted(form.opening.removeprefix(form.opening.rstrip("\n")))
        start = [
            f"start: {sequence} tail",
            "tail: TEXT",
            r"TEXT: /(.|\n)*/",
            f"head[lazy]: TEXT {_quoted(form.opening.rstrip(chr(10)))}",
            f"call: head {rest} {body}",
        ]
    source = "\n".join(["%llguidance {}", *start, f"any: {any_tool}", *rules])
    return structured_output.checked(Grammar("grammar", source, has_text=not is_required))


def _opening(form: ToolFormat, tokenizer: Tokenizer) -> str:
    """The text that opens a call, or the token where it is a marker of the vocabulary."""
    token_id = tokenizer.token_id(form.opening) if form.opening in tokenizer.markers else None
    return _quoted(form.opening) if token_id is None else f"<[{token_id}]>"


def _tool_rule(index: int, function: Mapping[str, Any], form: ToolFormat) -> str:
    head = f"{{{json.dumps('name')}: {json.dumps(function['name'], ensure_ascii=False)}, "
    head += f"{json.dumps(form.arguments)}: "
    schema = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    schema = {**schema, "type": "object"}  # arguments are an object, also where the schema leaves it open
    try:
        structured_output.json_schema(schema)
    except RequestError as error:
        if function.get("strict"):
            raise RequestError(f"tool {function['name']!r}: {error.message}", hint=error.hint) from error
        schema = {"type": "object"}
    schema = {**schema, "x-guidance": {"whitespace_pattern": structured_output.WHITESPACE}}
    source = json.dumps(schema, ensure_ascii=False)
    return f'tool_{index}: {_quoted(head)} arguments_{index} "}}"\narguments_{index}: %json {source}'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


# -- out: calls in what was written ------------------------------------------------------------------------


class CallReader:
    """Text as it comes, parted into what a reader sees and the calls, each as soon as it is whole."""

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._opening = form.opening.strip()
        signs = (self._opening, form.closing.strip(), "[", "]", ",", ";")
        self._separators = tuple(sign for sign in signs if sign)
        self._is_start = form.may_be_bare  # nothing but spaces has come
        self._is_calling = False
        self._waiting = ""
        self._raw = ""  # since the opening, as long as no call was read: it may turn out to be text

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """(text to show, calls that have ended) now."""
        self._waiting += text
        self._raw += text if self._raw else ""
        shown, calls = "", []
        goes_on = True
        while goes_on and self._waiting:
            if self._is_calling:
                found, goes_on = self._next_call()
                if isinstance(found, ToolCall):
                    calls.append(found)
            else:
                found, goes_on = self._next_text()
            shown += found if isinstance(found, str) else ""
        return shown, calls

    def finish(self) -> str:
        """What is left when no text follows: a call that was cut is text."""
        if not self._is_calling:
            return self._waiting
        return self._raw or self._waiting.strip(" \n[];,")

    def _next_text(self) -> tuple[str, bool]:
        """Text before a call, and whether one begins."""
        waiting = self._waiting
        if self._is_start:
            bare = re.sub(r"\s", "", waiting)
            if any(begin.startswith(bare) for begin in _BARE_CALLS):
                return "", False
            self._is_start = False
            if bare.startswith(_BARE_CALLS):
                self._is_calling, self._raw = True, waiting
                return "", True
        if self._opening and self._opening in waiting:
            text, opening, self._waiting = waiting.partition(self._opening)
            self._is_calling, self._raw = True, opening + self._waiting
            return text.rstrip(), True
        kept = next((n for n in range(len(self._opening), 0, -1) if waiting.endswith(self._opening[:n])), 0)
        # Spaces before a call are no part of the text.
        end = len(waiting[: len(waiting) - kept].rstrip())
        self._waiting = waiting[end:]
        return waiting[:end], False

    def _next_call(self) -> tuple[ToolCall | str, bool]:
        """A whole call, or the text that turned out to be none; and whether anything may be read after it."""
        waiting = self._waiting.lstrip()
        for sign in self._separators:
            if waiting.startswith(sign):
                self._waiting = waiting[len(sign) :]
                return "", True
        if not waiting.startswith("{"):
            if not waiting or any(sign.startswith(waiting) for sign in self._separators):
                return "", False
            return self._as_text(waiting)
        try:
            value, end = json.JSONDecoder().raw_decode(waiting)
        except (ValueError, RecursionError):
            return "", False
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return self._as_text(waiting)
        self._waiting, self._raw = waiting[end:], ""
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False)), True

    def _as_text(self, waiting: str) -> tuple[str, bool]:
        text = self._raw or waiting
        self._is_calling, self._waiting, self._raw = False, "", ""
        return text, True


_BARE_CALLS = ('{"name":', '[{"name":')


def read_calls(text: str, form: ToolFormat) -> tuple[str, list[ToolCall]]:
    """The text without its calls, and the calls."""
    reader = CallReader(form)
    shown, calls = reader.push(text)
    return shown + reader.finish(), calls
