"""A small part of JSON Schema: what a reply with several values looks like, said in words and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from nemotron4.records import JsonObject

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
    """The first JSON object in a reply, with or without a fence around it."""
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            value, _ = json.JSONDecoder().raw_decode(text[start:])
        except (ValueError, RecursionError):
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
