"""The request of NeMo's ``PUT /generate``: fields, defaults, bounds, order of checks and exact texts.

Source: NeMo v2.0.0rc0, ``nemo/collections/nlp/modules/common/text_generation_server.py``, observed by running
it. A failed check is a ``RefusalError``; how it is sent depends on ``--nemo-compat``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any

MAX_SENTENCES = 128
END_OF_TEXT = "<|endoftext|>"

TOO_MANY_SENTENCES = "Maximum number of sentences is 128"
TASK_IDS = (
    "Input at 'sentences' must by a tuple of two tensors like:"
    + " " * 20
    + "(context_tokens_tensor, context_length_tensor) if task ids are given"
)
# Texts of our own, where NeMo answers 500, hangs, or takes a string apart into characters.
NOT_AN_OBJECT = "The request body must be a JSON object"
NO_SENTENCES = "sentences is required: a list of strings"
NOT_STRINGS = "sentences must be a list of strings"
NO_PROMPTS = "sentences must hold at least one string"


class RefusalError(Exception):
    """A request is refused. ``status`` is what NeMo answers with, or 400 where NeMo breaks."""

    def __init__(self, text: str, status: int = 200) -> None:
        super().__init__(text)
        self.text = text
        self.status = status


def _is_number(value: object) -> bool:
    return type(value) in (int, float)  # a bool is no number here, as in NeMo


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least  # isinstance: true counts as 1, as in NeMo


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


_STRINGS = {"type": "array", "items": {"type": "string"}}
_BOOL = {"type": "boolean"}


def _field(default: Any, text: str, is_valid: Callable[[Any], bool], schema: dict[str, Any] | None) -> Any:
    """NeMo's default, the text it refuses with, its check, and its OpenAPI schema (None: not shown)."""
    return field(default=default, metadata={"text": text, "is_valid": is_valid, "schema": schema})


def _flag(name: str) -> Any:
    return _field(False, f"{name} must be a boolean value", lambda v: isinstance(v, bool), _BOOL)


@dataclass(frozen=True, kw_only=True)
class NemoRequest:
    """A request that passed; the fields are in the order in which NeMo checks them."""

    sentences: tuple[str, ...]
    task_ids: None = _field(None, TASK_IDS, lambda _: False, None)
    tokens_to_generate: int = _field(
        64,
        "tokens_to_generate must be an integer greater than 0",
        lambda v: _is_int(v, 1),
        {"type": "integer", "minimum": 1},
    )
    all_probs: bool = _flag("all_probs")
    temperature: float = _field(
        1.0,
        "temperature must be a positive number less than or equal to 100.0",
        lambda v: _is_number(v) and 0 < v <= 100,
        {"type": "number", "exclusiveMinimum": 0, "maximum": 100},
    )
    add_BOS: bool = _flag("add_BOS")
    greedy: bool = _flag("greedy")
    top_k: float = _field(
        0,
        "top_k must be a positive integer number",
        lambda v: _is_number(v) and v >= 0,
        {"type": "number", "minimum": 0},
    )
    top_p: float = _field(
        0.9,
        "top_p must be a positive number less than or equal to 1.0",
        lambda v: _is_number(v) and 0 <= v <= 1,
        {"type": "number", "minimum": 0, "maximum": 1},
    )
    repetition_penalty: float | None = _field(  # None: not given. NeMo's default of 1.2 has no effect there
        None,
        "repetition_penalty must be a positive number no less than 1.0",
        lambda v: _is_number(v) and v >= 1,
        {
            "type": "number",
            "minimum": 1,
            "description": "Checked, and without effect unless the server runs with --nemo-compat fixed.",
        },
    )
    end_strings: tuple[str, ...] = _field(
        (END_OF_TEXT,),
        "expect end_strings to be a list of strings",
        lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v),
        _STRINGS,
    )
    min_tokens_to_generate: int = _field(
        0,
        "min_tokens_to_generate must be an integer no less than 0",
        lambda v: _is_int(v, 0),
        {"type": "integer", "minimum": 0},
    )
    neighbors: int | None = _field(
        None,
        "num of neighbors must be an integer no less than 0",
        lambda v: _is_int(v, 0),
        {"type": "integer", "minimum": 0, "description": "Checked and ignored."},
    )
    compute_logprob: bool = _flag("compute_logprob")
    random_seed: int | None = _field(
        None,
        "random_seed must be a positive integer number or None",
        lambda v: v is None or _is_int(v, 0),
        {"type": ["integer", "null"], "minimum": 0},
    )


CHECKED = [each for each in fields(NemoRequest) if each.metadata]


def parse(body: object) -> NemoRequest:
    """The request, or the first RefusalError in NeMo's order. Unknown keys do not matter."""
    if not isinstance(body, dict):
        raise RefusalError(NOT_AN_OBJECT, 400)
    sentences = body.get("sentences")
    if not isinstance(sentences, list | str | dict):
        raise RefusalError(NO_SENTENCES, 400)
    if len(sentences) > MAX_SENTENCES:
        raise RefusalError(TOO_MANY_SENTENCES, 400)
    for each in CHECKED:
        if each.name in body and not each.metadata["is_valid"](body[each.name]):
            raise RefusalError(each.metadata["text"])
    # NeMo looks at what is in the list only when it tokenises, after every other check.
    if not isinstance(sentences, list) or not all(isinstance(item, str) for item in sentences):
        raise RefusalError(NOT_STRINGS, 400)
    if not sentences:
        raise RefusalError(NO_PROMPTS, 400)
    values = {each.name: body[each.name] for each in CHECKED if each.name in body}
    if "end_strings" in values:
        values["end_strings"] = tuple(values["end_strings"])
    for name in ("tokens_to_generate", "min_tokens_to_generate", "random_seed"):
        if isinstance(values.get(name), bool):
            values[name] = int(values[name])
    for name in ("top_k", "repetition_penalty"):
        if not _is_finite(values.get(name) or 0):
            raise RefusalError(f"{name} must be a finite number", 400)
    return NemoRequest(sentences=tuple(sentences), **values)


def _schema(checked: Field[Any]) -> dict[str, Any]:
    schema: dict[str, Any] = dict(checked.metadata["schema"])
    default = checked.default
    if default is not None:
        schema["default"] = list(default) if isinstance(default, tuple) else default
    return schema


REQUEST_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["sentences"],
    "additionalProperties": True,
    "properties": {
        "sentences": {**_STRINGS, "minItems": 1, "maxItems": MAX_SENTENCES},
        **{each.name: _schema(each) for each in CHECKED if each.metadata["schema"] is not None},
    },
}
_ROWS = {"type": "array", "items": _STRINGS}
_INT_ROWS = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
_FLOAT_ROWS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}
ANSWER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["logprob", "offsets", "sentences", "token_ids", "tokens"],
    "properties": {
        "full_logprob": {"anyOf": [{"type": "null"}, {"type": "array", "items": _FLOAT_ROWS}]},
        "logprob": {"anyOf": [{"type": "null"}, _FLOAT_ROWS]},
        "offsets": _INT_ROWS,
        "sentences": _STRINGS,
        "token_ids": _INT_ROWS,
        "tokens": _ROWS,
    },
}
_MESSAGE = {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_TEXT = {"type": "string"}
GENERATE_DOCUMENTATION: dict[str, Any] = {
    "summary": "Continue up to 128 prompts, as the NeMo server does",
    "response_model": None,
    "openapi_extra": {
        "requestBody": {"required": True, "content": {"application/json": {"schema": REQUEST_SCHEMA}}}
    },
    "responses": {
        200: _json(
            "Prompt and completion of every row; with --nemo-compat strict also the text of a refusal.",
            {"anyOf": [ANSWER_SCHEMA, _TEXT]},
        ),
        400: _json("The request cannot be served, and why.", {"anyOf": [_TEXT, _MESSAGE]}),
        401: _json("The API key is missing or wrong.", _TEXT),
        403: _json("The Host header names somebody else.", _TEXT),
        408: _json("The body did not arrive in time.", _TEXT),
        413: _json("The body is too large.", _TEXT),
        415: _json("The body is not declared as JSON.", _MESSAGE),
        429: _json("The queue is full; Retry-After says when to try again.", _TEXT),
        500: _json("A defect of the server.", _TEXT),
        503: _json("The server is shutting down.", _TEXT),
    },
}
