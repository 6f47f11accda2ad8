"""Rows of any type as columns: what templates may name, and rows made of columns again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from typing import Any

from nemotron4.client import BadContentError
from nemotron4.records import JsonObject, Message
from nemotron4.synth.judges import shown
from nemotron4.synth.rows import Answered, ColumnRow, Dialogue, Document, JudgedPair, Prompt, Root, Row, Topic

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_BRACES = re.compile(r"\{([^{}\n]+)\}")  # a column may be called "Best Answer"
_JINJA = re.compile(r"\{\{-?(?:\s+[A-Za-z_]|[A-Za-z_]\w*[ .|\[]).*?\}\}|\{%-?\s*(?:for|if|set|end)\w*")
_PROMPT = frozenset({"prompt", "conversation", "task", "topic", "answer", "tests"})
_COLUMNS: Mapping[type, frozenset[str]] = {
    Topic: frozenset({"topic", "area", "above", "level"}),
    Document: frozenset({"text", "document_id", "source"}),
    Prompt: _PROMPT,
    Answered: _PROMPT | {"responses", "num_responses"},
    JudgedPair: _PROMPT | {"chosen", "rejected", "judge"},
    Dialogue: frozenset({"prompt", "conversation", "task", "topic", "answer"}),
}
# What a stage that makes rows of columns can make: its fields, the needed ones first.
MADE: Mapping[str, tuple[type, tuple[str, ...], tuple[str, ...]]] = {
    "record": (ColumnRow, (), ()),
    "topic": (Topic, ("topic",), ("area",)),
    "document": (Document, ("text",), ("document_id",)),
    "prompt": (Prompt, ("prompt",), ("system", "task", "topic", "answer")),
    "dialogue": (Dialogue, ("user", "assistant"), ("system", "task", "topic")),
}


def columns_of(row: Row) -> JsonObject:
    """A row by names. ``answer`` is what is known to be right, or what a dialogue ends with."""
    match row:
        case ColumnRow():
            return dict(row.columns)
        case Root():
            return dict(row.entry)
        case Topic():
            return {"topic": row.topic, "area": row.area, "above": row.above, "level": row.level}
        case Document():
            return {"text": row.text, "document_id": row.document_id, "source": row.source}
        case Prompt():
            values = {"prompt": row.text, "conversation": shown(row.messages), "task": row.task}
            return values | {"topic": row.topic, "answer": row.answer, "tests": row.tests}
        case Answered():
            texts = [response.text for response in row.responses]
            numbered = "\n\n".join(f"[{i}]\n{text}" for i, text in enumerate(texts, 1))
            answers = {f"response_{i}": text for i, text in enumerate(texts, 1)}
            return columns_of(row.prompt) | answers | {"responses": numbered, "num_responses": len(texts)}
        case JudgedPair():
            pair = {"chosen": row.chosen.text, "rejected": row.rejected.text, "judge": row.judge}
            return columns_of(row.prompt) | pair
        case Dialogue():
            user = next(message.content for message in row.messages if message.role == "user")
            values = {"prompt": user, "conversation": shown(row.messages), "task": row.task}
            return values | {"topic": row.topic, "answer": row.messages[-1].content}


def known_columns(made: type) -> Set[str] | None:
    """The columns that every row of a type has; None where only the rows can tell."""
    return _COLUMNS.get(made)


def placeholders(*templates: str) -> set[str]:
    return {name for template in templates for name in PLACEHOLDER.findall(template)}


def fill(template: str, columns: Mapping[str, Any]) -> str:
    """Column names in braces replaced in one pass; other braces stay. Lists and objects become JSON."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in columns and not PLACEHOLDER.fullmatch(match[0]):
            return match[0]
        if name not in columns:
            raise BadContentError(
                f"there is no column {name!r}; there is {', '.join(columns)}", kind="column"
            )
        found = columns[name]
        if found is None:
            return ""
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

    return _BRACES.sub(value, template)


def check_templates(*templates: str) -> None:
    """ValueError for what Jinja would fill in, and the model would be sent as it is."""
    for template in templates:
        if found := _JINJA.search(template):
            raise ValueError(
                f"{found[0]!r} is of Jinja; a column is its name in single braces, as in {{text}}"
            )


def check_fields(makes: str, fields: Mapping[str, str]) -> None:
    """ValueError unless ``fields`` are those of what is made."""
    check_templates(*fields.values())
    if makes not in MADE:
        raise ValueError(f"makes is {makes!r}; expected one of {', '.join(MADE)}")
    _, needed, more = MADE[makes]
    unknown = set(fields) - {*needed, *more}
    if makes == "record" and fields:
        raise ValueError("fields are for other rows than records, which have columns")
    if unknown or not set(needed) <= set(fields):
        raise ValueError(
            f"fields are {sorted(fields)}; a {makes} has {', '.join(needed)}, and perhaps {', '.join(more)}"
        )


def make_row(makes: str, fields: Mapping[str, str], columns: Mapping[str, Any]) -> Row:
    """A row of the kind ``makes``, each of its fields a template over the columns."""
    if makes == "record":
        return ColumnRow(columns=dict(columns))
    values = {name: fill(template, columns).strip() for name, template in fields.items()}
    for name in MADE[makes][1]:
        if not values[name]:
            raise BadContentError(f"the field {name!r} of the {makes} is empty", kind="blank")
    system = (Message("system", values["system"]),) if values.get("system") else ()
    topic, task = values.get("topic") or None, values.get("task") or "own"
    if makes == "topic":
        return Topic(topic=values["topic"], area=values.get("area") or "general")
    if makes == "document":
        return Document(document_id=values.get("document_id", ""), text=values["text"])
    if makes == "prompt":
        messages = (*system, Message("user", values["prompt"]))
        return Prompt(messages=messages, task=task, topic=topic, answer=values.get("answer") or None)
    messages = (*system, Message("user", values["user"]), Message("assistant", values["assistant"]))
    return Dialogue(messages=messages, task=task, topic=topic)
