"""A message as clients send it: one form for all routes, ``generate`` files and ``engine.generate``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron4.engine import ChatFormat
from nemotron4.errors import unknown_name
from nemotron4.records import FieldError, JsonObject, Message

CUSTOM_INPUT = "input"  # the argument of a custom tool, which takes a text
ROLES = ("system", "developer", "user", "assistant", "tool")
# What this package cannot say; null and empty ask for nothing.
UNSUPPORTED = ("function_call", "audio")
MESSAGE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["role"],
    "description": "One turn. A message of an earlier answer can be sent back as it came.",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["type", "text"],
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                    },
                },
                {"type": "null"},
            ]
        },
        "tool_calls": {"anyOf": [{"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
        "tool_call_id": {"type": ["string", "null"]},
    },
}


def read_message(value: object, where: str) -> Message:
    """FieldError for what cannot be written into a prompt; fields that cannot change it are ignored.

    ``developer`` is OpenAI's newer word for ``system``. An assistant's message may have no content.
    """
    if isinstance(value, Message):
        return value
    if not isinstance(value, Mapping):
        raise FieldError(f"{where} is {value!r:.60}; expected an object with role and content")
    role = value.get("role")
    if not isinstance(role, str):
        raise FieldError(f"{where}: field 'role' is {role!r:.60}; expected {', '.join(ROLES)}")
    if role.lower() not in ROLES:
        message, hint = unknown_name("role", role[:60], ROLES)
        raise FieldError(f"{where}: {message}; {hint}")
    for name in UNSUPPORTED:
        if value.get(name):
            raise FieldError(f"{where}: {name} is not supported by this server; leave it out or send null")
    content = _text(value.get("content"), f"{where}: field 'content'")
    if content is None and role.lower() != "assistant":
        raise FieldError(f"{where}: a {role.lower()} message needs content")
    more: dict[str, Any] = {}
    if value.get("tool_calls"):
        more["tool_calls"] = _tool_calls(value["tool_calls"], f"{where}: field 'tool_calls'")
    if isinstance(value.get("tool_call_id"), str):
        more["tool_call_id"] = value["tool_call_id"]
    return Message("system" if role.lower() == "developer" else role.lower(), content or "", more)


def _tool_calls(calls: object, where: str) -> list[JsonObject]:
    """Calls as chat templates read them: OpenAI's, with the arguments as an object."""
    made: list[JsonObject] = []
    for place, call in enumerate(calls if isinstance(calls, list) else [None]):
        if isinstance(call, Mapping) and call.get("type") == "custom":
            made.append(_custom_call(call, f"{where}[{place}]"))
            continue
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise FieldError(f"{where}[{place}] is {call!r:.60}; expected a function with name and arguments")
        arguments = function.get("arguments", {})
        try:
            arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError) as error:
            raise FieldError(f"{where}[{place}]: the arguments are not JSON: {error}") from error
        named = {"name": function["name"], "arguments": arguments}
        made.append({"id": call.get("id"), "type": "function", "function": named})
    return made


def _custom_call(call: Mapping[str, Any], where: str) -> JsonObject:
    """A call of OpenAI's custom tools as one of a function whose argument is the text."""
    custom = call.get("custom")
    if not isinstance(custom, Mapping) or not all(isinstance(custom.get(n), str) for n in ("name", "input")):
        raise FieldError(f"{where} is {call!r:.60}; expected a custom tool with name and input")
    named = {"name": custom["name"], "arguments": {CUSTOM_INPUT: custom["input"]}}
    return {"id": call.get("id"), "type": "function", "function": named}


def read_messages(values: object, where: str) -> tuple[Message, ...]:
    """A list of at least one message."""
    if not isinstance(values, list | tuple):
        raise FieldError(f"{where} is {values!r:.60}; expected a list of messages")
    if not values:
        raise FieldError(f"{where} is empty; expected at least one message")
    return tuple(read_message(value, f"{where}[{place}]") for place, value in enumerate(values))


def _text(content: object, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise FieldError(f"{where} is {content!r:.60}; expected a string or a list of text parts")
    parts = []
    for place, part in enumerate(content):
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise FieldError(f"{where}[{place}] is {part!r:.60}; expected {{'type': 'text', 'text': ...}}")
        if part.get("type", "text") != "text":
            raise FieldError(f"{where}[{place}] is of type {part['type']!r:.40}; only text is read")
        parts.append(part["text"])
    return "".join(parts)


def with_one_system_message(messages: Sequence[Message]) -> list[Message]:
    """The system messages at the start joined into one, for formats that have room for one."""
    num = next((i for i, each in enumerate(messages) if each.role != "system"), len(messages))
    if num < 2:
        return list(messages)
    joined = "\n\n".join(each.content for each in messages[:num])
    return [Message("system", joined), *messages[num:]]


def with_calls_as_text(
    messages: Sequence[Message], own: ChatFormat | None, described: Sequence[JsonObject] = ()
) -> Sequence[Message]:
    """Tools, calls and results as text, for a format (None: the reward model's) that knows none of them."""
    if not described and not any("tool_calls" in message.more for message in messages):
        return messages
    from nemotron4.text import tools  # here: it brings the library of grammars, which few conversations need

    if own is None:
        return tools.spelled(messages, described, tools.FORMATS["nemotron"])
    return messages if tools.knows_tools(own) else tools.spelled(messages, described, tools.format_of(own))
