"""The fields of a row of training data: what has been read, and the readers that several stages share.

Every column of a row is read, or counted as ignored, or refused because its name carries meaning
(``Fields.unread``). A prompt that is a string is taken as already rendered; a list of messages is rendered
by the model's format. Every refusal names the field; the reader adds file and line. Nothing is filled in.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemotron4.records import ATTRIBUTES, FieldError, JsonObject, Message, require

Prompt = str | tuple[Message, ...]
MISSING = -100.0
SYSTEM_NAMES = ("system", "system_prompt")  # the second is OpenOrca's
TRAIN_NAMES = ("weight", "train", "training", "loss")  # of a message: OpenAI's, axolotl's, and others'
ALL_ATTRIBUTES = ("quality", "toxicity", "humor", "creativity", *ATTRIBUTES)
# A row that has one of these and is read without it would train something else than it says.
_MEANING = """
instruction input output history tools functions tool_calls function_call loss_weight loss_mask mask
label labels score scores score_chosen score_rejected reward rewards chosen_reward rejected_reward
chosen_score rejected_score chosen_rating rejected_rating rating_chosen rating_rejected rating
margin preference preference_strength overall_preference chosen rejected chosen_response
rejected_response completion completions response responses answer messages conversations prompt
prompt_turns question context text attributes images image videos video audio documents
reasoning_content thinking chat_template_kwargs loss_scale completion_mask assistant_masks trainable
train_detail training_detail reasoning
"""
MEANINGFUL = frozenset((*_MEANING.split(), *ALL_ATTRIBUTES, *SYSTEM_NAMES, *TRAIN_NAMES, "system_message"))
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
LISTED = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
TURN_MARK = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
HH_MARK = re.compile(r"\n\n(Human|Assistant):")


class Fields(Mapping[str, Any]):
    """A row, or an object in one, that knows which of its fields were read.

    ``is_text``: the row is from a table of texts (CSV); other values are written in them as JSON.
    """

    def __init__(self, row: JsonObject, *, is_text: bool = False) -> None:
        self.row = {name: _cell(value) for name, value in row.items()} if is_text else row
        self.is_text = is_text
        self._read: set[str] = set()
        self._inside: dict[str, None] = {}  # unread fields of the objects in it

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self.row[name]

    def __contains__(self, name: object) -> bool:
        """True if the field holds something; asking is not reading."""
        return self.row.get(name) is not None if isinstance(name, str) else False

    def __iter__(self) -> Iterator[str]:
        return iter(self.row)

    def __len__(self) -> int:
        return len(self.row)

    def require(self, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """The field's value, or FieldError if it is missing or not of the kind."""
        self._read.add(name)
        value = self.row.get(name)
        if self.is_text and isinstance(value, str) and kind is not str:
            value = _from_text(value, kind)
            return require({name: value}, name, kind, expected)
        return require(self.row, name, kind, expected)

    def text(self, name: str) -> str:
        return str(self.require(name, str, "a string"))

    def number(self, name: str) -> float | None:
        """A finite number; None if the field is missing or null."""
        self._read.add(name)
        if self.row.get(name) is None or (self.is_text and self.row[name] == ""):
            return None
        value = float(self.require(name, (int, float), "a number or null"))
        if not math.isfinite(value):
            raise FieldError(f"field {name!r} is {value}; expected a finite number")
        return value

    def left_inside(self, name: str, unread: Sequence[str]) -> None:
        """Count fields of the objects in column ``name`` as unread."""
        self._inside.update(dict.fromkeys(f"{name}[].{each}" for each in unread))

    def unread(self) -> list[str]:
        """Columns that nothing has read and that hold something; FieldError for one that carries meaning."""
        left = [
            name for name in self.row if name not in self._read and self.row[name] not in (None, "", [], {})
        ]
        meaningful = [name for name in left if name.lower().replace("-", "_") in MEANINGFUL]
        if meaningful:
            raise FieldError(
                f"field {meaningful[0]!r} carries meaning, and nothing reads it in a row of this form "
                f"(read: {', '.join(sorted(self._read & self.row.keys())) or 'nothing'}); name it in the "
                "source's map or ignore"
            )
        return [*left, *self._inside]


def _cell(value: Any) -> Any:
    """Messages that a table holds as JSON; every other cell as it is."""
    return _from_text(value, list) if isinstance(value, str) and LISTED.match(value) else value


def _from_text(value: str, kind: type | tuple[type, ...]) -> Any:
    try:
        found = json.loads(value.lower() if kind is bool else value)
    except ValueError:
        return value
    return found if isinstance(found, kind) else value


# ---- messages


def messages(row: Fields, name: str) -> tuple[Message, ...]:
    """A non-empty list of messages: ``role`` and ``content``, or ShareGPT's ``from`` and ``value``."""
    values = row.require(name, list, "a list of messages")
    if not values:
        raise FieldError(f"field {name!r} is empty; expected at least one message")
    return tuple(message(value, f"{name}[{i}]", row) for i, value in enumerate(values))


def message(value: object, where: str, row: Fields) -> Message:
    """One message of the row; what nothing reads of it is counted there."""
    if not isinstance(value, dict):
        raise FieldError(f"{where} is {json.dumps(value)[:60]}; expected an object with role and content")
    fields = Fields(value)
    try:
        found = _message(fields)
        row.left_inside(where.partition("[")[0], fields.unread())
    except FieldError as error:
        raise FieldError(f"{where}: {error}") from None
    return found


def _message(fields: Fields) -> Message:
    names = ("from", "value") if "from" in fields and "role" not in fields else ("role", "content")
    written = fields.text(names[0])
    role = ROLES.get(written.strip().lower())
    if role is None:
        raise FieldError(f"{names[0]} is {written!r}; expected one of {', '.join(ROLES)}")
    more: JsonObject = {}
    if written.strip().lower() in ("function_call", "tool_call"):
        content, more["tool_calls"] = "", [_called(fields.text(names[1]))]
    elif "tool_calls" in fields:
        content = "" if fields.get(names[1]) is None else _content(fields, names[1])
        more["tool_calls"] = _tool_calls(fields)
    else:
        content = _content(fields, names[1])
    for name in ("tool_call_id", "name"):
        if name in fields:
            more[name] = fields.text(name)
    return Message(role, content, more=more, trains=_trains(fields, role))


def _content(fields: Fields, name: str) -> str:
    """A string, or OpenAI's list of parts, of which only texts have a form here."""
    value = fields.row.get(name)
    if not isinstance(value, list):
        return fields.text(name)
    texts = []
    for i, part in enumerate(fields[name]):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise FieldError(f"{name}[{i}] is of type {kind!r}; only parts of type 'text' can train")
        texts.append(part["text"])
    return "".join(texts)


def _trains(fields: Fields, role: str) -> bool:
    for name in TRAIN_NAMES:
        if name in fields:
            value = fields[name]
            if value not in (0, 1):
                raise FieldError(f"field {name!r} is {value!r}; expected 0 or 1, whether the message trains")
            if value and role != "assistant" and name != "weight":
                raise FieldError(f"field {name!r} is {value!r}, and only the assistant's messages can train")
            return bool(value)
    return True


def _tool_calls(fields: Fields) -> list[JsonObject]:
    calls = fields.require("tool_calls", list, "a list of calls")
    found = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FieldError(f"tool_calls[{i}] has no function name")
        arguments = _arguments(function.get("arguments"), f"tool_calls[{i}]")
        found.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
        if "function" not in call:
            found[-1] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return found


def _arguments(value: object, where: str) -> JsonObject:
    """OpenAI's API has them as text; templates write objects."""
    if isinstance(value, str):
        value = _from_text(value, dict) if value.strip() else {}
    if value is not None and not isinstance(value, dict):
        raise FieldError(f"{where} has the arguments {json.dumps(value)[:60]}; expected a JSON object")
    return value or {}


def _called(text: str) -> JsonObject:
    """ShareGPT's ``function_call``: the call as JSON text."""
    try:
        call = json.loads(text)
        name, given = call["name"], call["arguments"]
    except (ValueError, KeyError, TypeError):
        raise FieldError("a function_call is not JSON with name and arguments") from None
    return {"type": "function", "function": {"name": name, "arguments": _arguments(given, "a function_call")}}


def tools(row: Fields) -> tuple[Any, ...]:
    """The tools that the row's conversation may call: a list, or that list as JSON text."""
    name = next((name for name in ("tools", "functions") if name in row), None)
    if name is None:
        return ()
    value = row[name]
    if isinstance(value, str):
        value = _from_text(value, list) if value.strip() else []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise FieldError(f"field {name!r} is not a list of objects; expected descriptions of tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


# ---- prompts and answers


def prompt(row: Fields, name: str, *, is_turn: bool = False) -> Prompt:
    """A string, taken as rendered, or messages, behind the row's system text where it has one.

    ``is_turn``: a string is what the user says, because the answers are messages.
    """
    if row.row.get(name) is None:
        raise FieldError(f"field {name!r} is missing; expected a text or a list of messages")
    if is_turn and isinstance(row.row[name], str):
        return (*system(row), *_history(row), Message("user", row.text(name)))
    if isinstance(row.row.get(name), str) and not (row.is_text and row.row[name].lstrip().startswith("[")):
        if any(row.row.get(other) for other in (*SYSTEM_NAMES, "history")):
            raise FieldError(
                f"a system text needs messages, and field {name!r} is text that is already rendered"
            )
        return row.text(name)
    return (*system(row), *messages(row, name))


def system(row: Fields) -> tuple[Message, ...]:
    """The column ``system`` as the first message, if it says anything."""
    name = next((name for name in SYSTEM_NAMES if row.row.get(name)), None)
    return () if name is None else (Message("system", row.text(name)),)


def asked(row: Fields) -> tuple[Message, ...] | None:
    """The turns of a row that has a question in words: Alpaca's instruction, Orca's question."""
    if "instruction" in row:
        parts = [row.text("instruction"), row.text("input") if row.row.get("input") else ""]
        row.get("input")
        text = "\n\n".join(part for part in parts if part)
    elif "question" in row and "prompt" not in row:
        text = row.text("question")
    else:
        return None
    return (*system(row), *_history(row), Message("user", text))


def _history(row: Fields) -> Iterator[Message]:
    """Alpaca's earlier turns: ``[[question, answer], ...]``."""
    if not row.row.get("history"):
        row.get("history")
        return
    for i, turn in enumerate(row.require("history", list, "a list of pairs")):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise FieldError(f"history[{i}] is not a pair of texts")
        yield Message("user", turn[0])
        yield Message("assistant", turn[1])


def marked_turns(text: str) -> tuple[Message, ...]:
    """HelpSteer's prompts: one user's turn, or several with the card's markers between them."""
    parts = TURN_MARK.split(text)
    roles = ["user", *(name.lower() for name in parts[1::2])]
    return tuple(Message(role, part) for role, part in zip(roles, parts[::2], strict=True))


def spoken_turns(text: str, name: str) -> tuple[Message, ...]:
    r"""Anthropic's form: ``\n\nHuman: ...\n\nAssistant: ...``."""
    first, *parts = HH_MARK.split(text)
    if first.strip() or not parts:
        raise FieldError(f"field {name!r} does not begin with a turn of Human or Assistant")
    return tuple(
        Message("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    )


def answer(row: Fields, name: str) -> str:
    """A string, or one assistant message in a list."""
    value = row.row.get(name)
    if not isinstance(value, list):
        if row.is_text and isinstance(value, str) and LISTED.match(value):
            raise FieldError(f"field {name!r} is a list of messages, but not in JSON: {value[:40]!r}")
        return row.text(name)
    found = messages(row, name)
    if len(found) != 1 or found[0].role != "assistant":
        raise FieldError(f"field {name!r} has {len(found)} messages; expected one of the assistant")
    return plain_answer(found[0], name)


def plain_answer(found: Message, name: str) -> str:
    if found.more:
        raise FieldError(
            f"field {name!r} has an answer with {', '.join(found.more)}; only texts can be compared"
        )
    if not found.trains:
        raise FieldError(f"field {name!r} is an answer of weight 0, which would train")
    return found.content


def label_values(value: object, where: str) -> Mapping[str, int]:
    """``quality:4,toxicity:0,...`` as numbers."""
    if not isinstance(value, str):
        raise FieldError(f"{where} is {value!r}; expected 'name:number,...'")
    try:
        pairs = [part.split(":") for part in value.strip().split(",")]
        return {name.strip(): int(number) for name, number in pairs}
    except ValueError:
        raise FieldError(f"{where} is {value!r}; expected 'name:number,...'") from None


def no_form(row: Fields, expected: str) -> FieldError:
    return FieldError(f"the row has fields {', '.join(sorted(row)) or 'none'}; expected {expected}")


def untrained(conversation: Sequence[Message]) -> tuple[Message, ...]:
    """The messages as context alone: answers in a prompt do not train."""
    return tuple(replace(m, trains=False) if m.role == "assistant" else m for m in conversation)
