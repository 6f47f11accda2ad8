"""One schema for each thing that real schemas ask for, in the manner of JSONSchemaBench's sets."""

from __future__ import annotations

from typing import Any

OBJECT: dict[str, Any] = {"type": "object"}


def _with(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


FEATURES: dict[str, Any] = {
    "type": {"type": "integer"},
    "type list": {"type": ["string", "null"]},
    "enum": {"enum": ["a", 1, None, {"b": []}]},
    "const": {"const": {"a": 1}},
    "properties": _with(a={"type": "string"}),
    "required": {**_with(a={}, b={}), "required": ["b"]},
    "additionalProperties false": {**_with(a={}), "additionalProperties": False},
    "additionalProperties schema": {**OBJECT, "additionalProperties": {"type": "number"}},
    "patternProperties": {**OBJECT, "patternProperties": {"^x-": {"type": "string"}}},
    "propertyNames": {**OBJECT, "propertyNames": {"pattern": "^[a-z]+$"}},
    "minProperties": {**OBJECT, "minProperties": 1},
    "maxProperties": {**OBJECT, "maxProperties": 2},
    "dependentRequired": {**_with(a={}, b={}), "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {**_with(a={}), "dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": {**_with(a={}, b={}), "dependencies": {"a": ["b"]}},
    "unevaluatedProperties": {**_with(a={}), "unevaluatedProperties": False},
    "items": {"type": "array", "items": {"type": "integer"}},
    "prefixItems": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]},
    "items false": {"type": "array", "prefixItems": [{"type": "string"}], "items": False},
    "items list (draft 4)": {"type": "array", "items": [{"type": "string"}], "additionalItems": False},
    "minItems, maxItems": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "minContains": {"type": "array", "contains": {"const": 1}, "minContains": 2},
    "unevaluatedItems": {"type": "array", "prefixItems": [{}], "unevaluatedItems": False},
    "minLength, maxLength": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]+$"},
    "pattern without anchors": {"type": "string", "pattern": "ab"},
    "pattern with look-ahead": {"type": "string", "pattern": "^(?!x).*$"},
    "pattern with a back reference": {"type": "string", "pattern": r"^(a+)b\1$"},
    "pattern and maxLength": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 4},
    **{
        f"format {name}": {"type": "string", "format": name}
        for name in (
            *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"),
            *("uri-reference", "uri-template", "iri", "idn-email", "json-pointer", "regex", "byte", "color"),
        )
    },
    "minimum, maximum": {"type": "integer", "minimum": -3, "maximum": 17},
    "exclusiveMinimum": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1.5},
    "exclusiveMinimum (draft 4)": {"type": "integer", "minimum": 0, "exclusiveMinimum": True},
    "multipleOf": {"type": "integer", "multipleOf": 5},
    "multipleOf a fraction": {"type": "number", "multipleOf": 0.01},
    "anyOf": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    "oneOf that differ by type": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
    "oneOf that differ by a const": {
        "oneOf": [{**_with(k={"const": k}), "required": ["k"], "additionalProperties": False} for k in "ab"]
    },
    "oneOf that overlap": {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 2}]},
    "allOf": {"allOf": [_with(a={"type": "string"}), {"required": ["a"]}]},
    "not": {"not": {"type": "string"}},
    "if, then, else": {"if": {"type": "string"}, "then": {"maxLength": 3}, "else": {"type": "integer"}},
    "$ref to $defs": {"$defs": {"t": {"type": "boolean"}}, "$ref": "#/$defs/t"},
    "$ref to definitions": {
        "definitions": {"t": {"type": "boolean"}},
        **_with(a={"$ref": "#/definitions/t"}),
    },
    "recursion": {"$defs": {"n": _with(next={"$ref": "#/$defs/n"})}, "$ref": "#/$defs/n"},
    "$ref to the root": _with(child={"$ref": "#"}),
    "$ref elsewhere": {"$ref": "https://example.com/schema.json"},
    "$anchor": {"$defs": {"t": {"$anchor": "t", "type": "null"}}, "$ref": "#t"},
    "$dynamicRef": {"$dynamicAnchor": "n", **_with(a={"$dynamicRef": "#n"})},
    "nullable (OpenAPI)": {"type": "string", "nullable": True},
    "discriminator (OpenAPI)": {"oneOf": [_with(k={"const": 1})], "discriminator": {"propertyName": "k"}},
    "default, examples, title": {"type": "integer", "default": 1, "examples": [2], "title": "n"},
    "contentEncoding": {"type": "string", "contentEncoding": "base64"},
    "true": True,
    "empty": {},
}
