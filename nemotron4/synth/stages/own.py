"""Stages of one's own: a prompt template over any columns, a Python function, rows from any file.

Replies with several values fit a small part of JSON Schema, said in words and checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from nemotron4.client import BadContentError, Sampling
from nemotron4.client.own_code import load_function, split_name
from nemotron4.records import JsonObject, Message
from nemotron4.synth.columns import (
    MADE,
    check_fields,
    check_templates,
    columns_of,
    fill,
    make_row,
    placeholders,
)
from nemotron4.synth.files import data_rows
from nemotron4.synth.rows import Answered, ColumnRow, Dialogue, Document, JudgedPair, Prompt, Root, Row, Topic
from nemotron4.synth.stage import Context, Filtered, Kind
from nemotron4.synth.stages.asking import answer

_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,),
    "object": (dict,), "null": (type(None),),
}  # fmt: skip
_KEYWORDS = {
    "type", "properties", "required", "additionalProperties", "items", "enum", "minimum", "maximum",
    "minItems", "maxItems", "minLength", "maxLength", "description", "title",
}  # fmt: skip


def check_schema(schema: Mapping[str, Any], where: str = "schema") -> None:
    """ValueError for what is not understood: nothing of a schema is passed over."""
    unknown = set(schema) - _KEYWORDS
    if unknown:
        raise ValueError(f"{where} has {sorted(unknown)}; understood: {', '.join(sorted(_KEYWORDS))}")
    if schema.get("type") not in _TYPES:
        raise ValueError(f"{where}: type is {schema.get('type')!r}; expected one of {', '.join(_TYPES)}")
    for name, part in schema.get("properties", {}).items():
        check_schema(part, f"{where}.{name}")
    if "items" in schema:
        check_schema(schema["items"], f"{where}[]")


def strict(schema: Mapping[str, Any]) -> JsonObject:
    """The schema as servers need it to hold a model to it: every key is required, and there are no others."""
    made = dict(schema)
    if made.get("properties"):
        made["properties"] = {name: strict(part) for name, part in made["properties"].items()}
        made.setdefault("required", list(made["properties"]))
        made.setdefault("additionalProperties", False)
    if "items" in made:
        made["items"] = strict(made["items"])
    return made


def in_words(schema: Mapping[str, Any]) -> str:
    """What is asked of a model that no grammar holds to it."""
    parts = [f'"{name}" ({_kind(part)})' for name, part in schema.get("properties", {}).items()]
    return f"Answer with one JSON object and nothing else. Its keys: {', '.join(parts)}."


def _kind(part: Mapping[str, Any]) -> str:
    if "enum" in part:
        return "one of " + ", ".join(json.dumps(value, ensure_ascii=False) for value in part["enum"])
    kind = str(part["type"])
    if kind == "array":
        return f"a list of {part['items']['type']}s" if "items" in part else "a list"
    span = [
        f"from {part['minimum']}" if "minimum" in part else "",
        f"to {part['maximum']}" if "maximum" in part else "",
    ]
    text = " ".join([f"{'an' if kind[0] in 'aeio' else 'a'} {kind}", *filter(None, span)])
    return f"{text}: {part['description']}" if part.get("description") else text


def find_object(text: str) -> JsonObject | None:
    """The first JSON object in a reply that can be kept, with or without a fence around it."""
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start)
            orjson.dumps(value)
        except (ValueError, TypeError, RecursionError):  # no JSON, or half of a character pair
            continue
        if isinstance(value, dict):
            return value
    return None


def objection(value: Any, schema: Mapping[str, Any], where: str = "reply") -> str | None:
    """Why a value does not fit, or None."""
    kind = schema["type"]
    is_wrong = not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")
    if is_wrong or ("enum" in schema and value not in schema["enum"]):
        return f"{where} is {json.dumps(value, ensure_ascii=False)[:60]}; expected {_kind(schema)}"
    size = value if kind in ("integer", "number") else len(value) if kind in ("string", "array") else None
    for low, high in (("minimum", "maximum"), ("minLength", "maxLength"), ("minItems", "maxItems")):
        is_inside = size is None or schema.get(low, size) <= size <= schema.get(high, size)
        if not is_inside:
            return f"{where} is {size}; allowed: {schema.get(low, '')} to {schema.get(high, '')}"
    parts: list[tuple[Any, Mapping[str, Any], str]] = []
    if kind == "object":
        properties: Mapping[str, Any] = schema.get("properties", {})
        missing = [name for name in schema.get("required", list(properties)) if name not in value]
        if missing:
            return f"{where} lacks {', '.join(missing)}"
        parts = [(value[name], part, f"{where}.{name}") for name, part in properties.items() if name in value]
    elif kind == "array" and "items" in schema:
        parts = [(entry, schema["items"], f"{where}[{i}]") for i, entry in enumerate(value)]
    return next(filter(None, (objection(*part) for part in parts)), None)


ANY_ROW = (Topic, Document, Prompt, Answered, JudgedPair, Dialogue, ColumnRow)


@dataclass(frozen=True)
class RowFileKnobs:
    """Every field of a row becomes a column; of CSV as a text."""

    file: Path
    limit: int = 0


@dataclass(frozen=True, kw_only=True)
class PromptKnobs:
    """``template`` and ``system`` name columns in braces. The reply is the column ``output``; with a
    ``schema`` (of a JSON object) each of its keys is a column, and a reply that does not fit is asked for
    again.

    each: a column with a list; every entry makes a row of its own, under the column's name. at_least and only
    drop rows by a number or a text of the reply. makes and fields say what rows are made: of columns
    (record), or a topic, document, prompt or dialogue, whose fields are templates too.
    """

    template: str
    system: str = ""
    output: str = "reply"
    schema: dict[str, Any] = field(default_factory=dict)
    each: str = ""
    at_least: dict[str, float] = field(default_factory=dict)
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    makes: str = "record"
    fields: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_templates(self.template, self.system)
        check_fields(self.makes, self.fields)
        if self.schema:
            check_schema(self.schema)
            if self.schema["type"] != "object" or not self.schema.get("properties"):
                raise ValueError("schema must be an object with properties: each of them becomes a column")
        unknown = {*self.at_least, *self.only, *([self.each] if self.each else [])} - set(self.columns)
        if unknown:
            raise ValueError(f"{sorted(unknown)} are no columns of the reply: {', '.join(self.columns)}")
        properties: Mapping[str, Any] = self.schema.get("properties", {self.output: {"type": "string"}})
        for name, least in self.at_least.items():
            part = properties[name]
            if part["type"] not in ("integer", "number") or part.get("maximum", least) < least:
                raise ValueError(f"at_least.{name} is {least:g}, which no reply has: {_kind(part)}")
        for name, allowed in self.only.items():
            part = properties[name]
            words = [True, False] if part["type"] == "boolean" else part.get("enum", allowed)
            if not {*allowed} <= {_word(value) for value in words}:
                raise ValueError(f"only.{name} is {allowed}, but the reply is {_kind(properties[name])}")

    @property
    def columns(self) -> tuple[str, ...]:
        """What the reply adds."""
        return tuple(self.schema["properties"]) if self.schema else (self.output,)


@dataclass(frozen=True, kw_only=True)
class FunctionKnobs:
    """``function`` is FILE.py:NAME. It gets a row as a dictionary of columns, or a list of up to
    ``batch_size`` rows if its parameter is called ``rows``; it returns a dictionary, a list of them, or None
    to drop the row. Its process ends when an answer takes longer than ``timeout_s``.
    """

    function: str
    batch_size: int = 64
    timeout_s: float = 60.0
    makes: str = "record"
    fields: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self.makes, self.fields)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; expected 1 or more")


@dataclass(frozen=True)
class SingleAnswerKnobs:
    """Which of the answers: the first, the longest, or the shortest."""

    which: str = "first"

    def __post_init__(self) -> None:
        if self.which not in ("first", "longest", "shortest"):
            raise ValueError(f"which is {self.which!r}; expected first, longest or shortest")


def file_roots(knobs: RowFileKnobs) -> Iterator[JsonObject]:
    for _, row in data_rows(knobs.file, knobs.limit):
        yield json.loads(json.dumps(row, default=str))  # dates of Parquet become texts


async def file_rows(root: Root, context: Context, knobs: RowFileKnobs) -> Sequence[Row]:
    """Root -> record."""
    return [ColumnRow(columns=root.entry)]


async def prompt(row: Row, context: Context, knobs: PromptKnobs) -> Sequence[Row]:
    """Row -> one row with the reply's columns, or one for each entry of a list in it."""
    columns = columns_of(row)
    request = fill(knobs.template, columns)
    if knobs.schema:
        request = f"{request}\n\n{in_words(knobs.schema)}"
    system = (Message("system", fill(knobs.system, columns)),) if knobs.system else ()
    messages = (*system, Message("user", request))
    made = (
        await _structured(context, messages, knobs) if knobs.schema else await _text(context, messages, knobs)
    )
    found = []
    for values in _each(made, knobs.each):
        objection_found = _dropped(values, knobs)
        if objection_found is None:
            found.append(make_row(knobs.makes, knobs.fields, columns | values))
        elif not knobs.each:
            raise Filtered(*objection_found)
        else:
            context.count(f"entries_dropped: {objection_found[0]}")
    if not found:
        raise Filtered("no entry", "the list in the reply is empty, or all of it was dropped")
    return found


async def _text(context: Context, messages: Sequence[Message], knobs: PromptKnobs) -> JsonObject:
    reply = await answer(context, messages, sample=0)
    if reply.finish_reason == "length":
        raise Filtered("truncated", "the token limit cut the reply")
    return {knobs.output: reply.text.strip()}


async def _structured(context: Context, messages: Sequence[Message], knobs: PromptKnobs) -> JsonObject:
    reason = ""
    for sample in range(context.max_repairs + 1):
        reply = await context.chat(messages, sample=sample, schema=strict(knobs.schema))
        value = find_object(reply.text)
        reason = (
            objection(value, knobs.schema) or "" if value is not None else f"no object in {reply.text[:80]!r}"
        )
        if value is not None and not reason:
            return {name: value.get(name) for name in knobs.columns}
    raise BadContentError(f"the reply does not fit the schema: {reason}", kind="schema")


def _each(values: JsonObject, column: str) -> Iterator[JsonObject]:
    if not column:
        yield values
        return
    entries = values[column]
    for entry in entries if isinstance(entries, list) else [entries]:
        yield values | {column: entry}


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _dropped(values: Mapping[str, Any], knobs: PromptKnobs) -> tuple[str, str] | None:
    for name, least in knobs.at_least.items():
        if not isinstance(values[name], int | float) or values[name] < least:
            return f"low {name}", f"{values[name]}; at least {least:g} is asked"
    for name, allowed in knobs.only.items():
        if _word(values[name]) not in allowed:
            return f"other {name}", f"{values[name]!r}; expected {', '.join(allowed)}"
    return None


async def python(row: Row, context: Context, knobs: FunctionKnobs) -> Sequence[Row]:
    """Row -> what the author's function makes of its columns."""
    columns = columns_of(row)
    made = await context.run_python(
        knobs.function, columns, batch_size=knobs.batch_size, timeout_s=knobs.timeout_s
    )
    if made is None:
        raise Filtered("python", f"{knobs.function} returned None")
    values = made if isinstance(made, list) else [made]
    if not all(isinstance(value, dict) for value in values):
        raise BadContentError(f"{knobs.function} returned {made!r:.80}; expected dictionaries", kind="python")
    return [
        make_row(knobs.makes, knobs.fields, value if knobs.makes == "record" else columns | value)
        for value in values
    ]


def _check_python(knobs: FunctionKnobs) -> None:
    load_function(*split_name(knobs.function))


async def single_answer(row: Answered, context: Context, knobs: SingleAnswerKnobs) -> Sequence[Row]:
    """Answered -> a dialogue with one of its answers, for supervised fine-tuning."""
    response = row.responses[0]
    if knobs.which != "first":
        sign = 1 if knobs.which == "longest" else -1
        response = max(row.responses, key=lambda answer: sign * len(answer.text))
    source = row.prompt
    return [
        Dialogue(
            messages=(*source.messages, Message("assistant", response.text)),
            task=source.task, topic=source.topic, tags=source.tags,
            meta={**source.meta, "model": response.model},
        )
    ]  # fmt: skip


def _made(knobs: Any) -> type:
    return MADE[knobs.makes][0]


KINDS = {
    "row_file": Kind(
        summary="rows with any columns from a file of rows",
        takes=(), makes=ColumnRow, knobs=RowFileKnobs, roots=file_roots, run=file_rows,
    ),
    "prompt": Kind(
        summary="a template over any columns, its reply as columns or rows",
        takes=ANY_ROW, makes=ColumnRow, knobs=PromptKnobs, run=prompt, makes_by=_made,
        reads=lambda knobs: placeholders(knobs.template, knobs.system) | (
            placeholders(*knobs.fields.values()) - set(knobs.columns)
        ),
        adds=lambda knobs: knobs.columns,
        sampling=Sampling(temperature=0.7, max_tokens=1024), calls=lambda _: 1, fan_out=lambda _: 1,
    ),
    "python": Kind(
        summary="a function of your own, in a process of its own",
        takes=ANY_ROW, makes=ColumnRow, knobs=FunctionKnobs, run=python, makes_by=_made, check=_check_python,
        identity=lambda knobs: split_name(knobs.function)[0].read_text("utf-8", "replace"),
        calls=lambda _: 0, fan_out=lambda _: 1,
    ),
    "single_answer": Kind(
        summary="a dialogue of a prompt and one of its answers",
        takes=(Answered,), makes=Dialogue, knobs=SingleAnswerKnobs, run=single_answer,
        calls=lambda _: 0, fan_out=lambda _: 1,
    ),
}  # fmt: skip
