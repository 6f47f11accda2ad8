"""The fields by which OpenAI's, vLLM's and llama.cpp's clients ask for an answer in a form."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemotron4.engine import Grammar
from nemotron4.errors import RequestError
from nemotron4.server.context import ApiError
from nemotron4.text import structured_output


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class JsonSchemaFormat(_Strict):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Accepted; a schema is always followed strictly.")


class ResponseFormat(_Strict):
    """OpenAI's; ``schema`` with ``json_object`` is llama.cpp's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class StructuredOutputs(_Strict):
    """vLLM's: one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = Field(None, description="Accepted and ignored.")
    # What vLLM's own clients send along unset.
    disable_fallback: bool | None = Field(None, description="Accepted and ignored.")
    disable_additional_properties: Literal[False] | None = Field(None, description="Not supported.")
    whitespace_pattern: None = Field(None, description="Not supported.")
    structural_tag: None = Field(None, description="Not supported.")


class NvExt(_Strict):
    """NIM's."""

    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class StructuredFields(_Strict):
    """What completions and chat have in common; at most one may ask for a form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    nvext: NvExt | None = None
    guided_decoding_backend: str | None = Field(None, description="Accepted and ignored.")
    grammar: str | None = Field(None, description="llama.cpp's: a grammar in GBNF or Lark.")
    json_schema: dict[str, Any] | str | None = Field(None, description="llama.cpp's and SGLang's.")


def grammar_of(body: StructuredFields) -> Grammar | None:
    """The form that is asked for. ApiError for two of them, and for one that cannot be followed."""
    asked = [(name, kind, value) for name, kind, value in _asked(body) if value is not None]
    if len(asked) > 1:
        names = " and ".join(name for name, _, _ in asked)
        raise ApiError(400, f"{names} both ask for a form; send one of them", param=asked[1][0])
    if not asked:
        return None
    [(name, kind, value)] = asked
    makers = {
        "json": structured_output.json_schema,
        "regex": structured_output.regex,
        "choice": structured_output.choice,
        "grammar": structured_output.grammar,
    }
    try:
        return makers[kind](value)
    except RequestError as error:
        raise ApiError(400, f"{name}: {error}", param=name) from error


def _asked(body: StructuredFields) -> list[tuple[str, Literal["json", "regex", "choice", "grammar"], Any]]:
    outputs = body.structured_outputs or StructuredOutputs.model_validate({})
    nvext = body.nvext or NvExt()
    return [
        ("response_format", "json", _schema(body.response_format)),
        ("structured_outputs", "json", outputs.json_),
        ("structured_outputs", "json", {"type": "object"} if outputs.json_object else None),
        ("structured_outputs", "regex", outputs.regex),
        ("structured_outputs", "choice", outputs.choice),
        ("structured_outputs", "grammar", outputs.grammar),
        ("guided_json", "json", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "choice", body.guided_choice),
        ("guided_grammar", "grammar", body.guided_grammar),
        ("nvext", "json", nvext.guided_json),
        ("nvext", "regex", nvext.guided_regex),
        ("nvext", "choice", nvext.guided_choice),
        ("nvext", "grammar", nvext.guided_grammar),
        ("grammar", "grammar", body.grammar or None),
        ("json_schema", "json", body.json_schema),
    ]


def _schema(given: ResponseFormat | None) -> dict[str, Any] | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return given.schema_ or {"type": "object"}
    schema = given.json_schema.schema_ if given.json_schema else given.schema_
    if schema is None:
        raise ApiError(400, "response_format: json_schema needs a schema", param="response_format")
    return schema
