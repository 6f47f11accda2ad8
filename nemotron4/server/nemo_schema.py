"""``PUT /generate`` in the OpenAPI page. The checks themselves are in ``nemo_validation``."""

from __future__ import annotations

from typing import Any

from nemotron4.server.nemo_validation import END_OF_TEXT, MAX_SENTENCES

_STRINGS = {"type": "array", "items": {"type": "string"}}
_ROWS = {"type": "array", "items": _STRINGS}
_INT_ROWS = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
_FLOAT_ROWS = {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}

REQUEST_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["sentences"],
    "additionalProperties": True,
    "properties": {
        "sentences": {**_STRINGS, "minItems": 1, "maxItems": MAX_SENTENCES},
        "tokens_to_generate": {"type": "integer", "minimum": 1, "default": 64},
        "all_probs": {"type": "boolean", "default": False},
        "temperature": {"type": "number", "exclusiveMinimum": 0, "maximum": 100, "default": 1.0},
        "add_BOS": {"type": "boolean", "default": False},
        "greedy": {"type": "boolean", "default": False},
        "top_k": {"type": "number", "minimum": 0, "default": 0},
        "top_p": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.9},
        "repetition_penalty": {
            "type": "number",
            "minimum": 1,
            "description": "Checked, and without effect unless the server runs with --nemo-compat fixed.",
        },
        "end_strings": {**_STRINGS, "default": [END_OF_TEXT]},
        "min_tokens_to_generate": {"type": "integer", "minimum": 0, "default": 0},
        "neighbors": {"type": "integer", "minimum": 0, "description": "Checked and ignored."},
        "compute_logprob": {"type": "boolean", "default": False},
        "random_seed": {"type": ["integer", "null"], "minimum": 0},
    },
}
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
