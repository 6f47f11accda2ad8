"""One line of an input file as a request: prompt ids, sampling settings, and what is copied to the answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron4.engine import Grammar, InferenceEngine, SamplingParams, SamplingRequest, derive_seed
from nemotron4.errors import DataError, unknown_name
from nemotron4.records import FieldError, JsonObject, optional_number, require
from nemotron4.text import structured_output
from nemotron4.text.answers import chat_request, text_request
from nemotron4.text.messages import read_messages

# What a row may say about its own sampling; every other row follows the command's options.
INTEGERS = ("max_new_tokens", "min_new_tokens", "top_k", "seed")
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
PROMPTS = ("prompt", "messages")
CARRIED = ("id", "meta")
SEED_RULE = 2  # rows are samples of the run's seed: ``derive_seed``
FIELDS = (*PROMPTS, *CARRIED, *INTEGERS, *NUMBERS, "stop", "logprobs", "json_schema")


def parse_json(line: bytes) -> JsonObject:
    try:
        row = json.loads(line, parse_constant=_not_json)
        json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise FieldError(f"not UTF-8 text: {error.reason}") from error
    except RecursionError as error:
        raise FieldError("it nests too deeply") from error
    except ValueError as error:
        raise FieldError(f"not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise FieldError("the line is not a JSON object")
    return row


def _not_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def carried(row: Mapping[str, Any]) -> JsonObject:
    return {name: row[name] for name in CARRIED if row.get(name) is not None}


def read_request(engine: InferenceEngine, row: JsonObject, defaults: SamplingParams) -> SamplingRequest:
    for name in row:
        if name not in FIELDS:
            message, hint = unknown_name("field", name, FIELDS)
            raise FieldError(f"{message}; {hint} Other data belongs under 'meta'")
    changes: dict[str, Any] = {
        name: require(row, name, int, "an integer") for name in INTEGERS if name in row
    }
    changes |= {name: optional_number(row, name) for name in NUMBERS if row.get(name) is not None}
    if "stop" in row:
        changes["stop_strings"] = (*defaults.stop_strings, *_stop_strings(row))
    if "logprobs" in row:
        changes["logprobs"] = 0 if require(row, "logprobs", bool, "true or false") else None
    if row.get("json_schema") is not None:
        schema = require(row, "json_schema", (dict, str), "a JSON schema")
        changes["grammar"] = structured_output.json_schema(schema)
    return _request(engine, row, dataclasses.replace(defaults, **changes))


def read_schema(path: Path | None) -> Grammar | None:
    """The form of answers that a file with a JSON schema asks for."""
    if path is None:
        return None
    try:
        return structured_output.json_schema(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _request(engine: InferenceEngine, row: JsonObject, params: SamplingParams) -> SamplingRequest:
    given = [name for name in PROMPTS if name in row]
    if len(given) != 1:
        raise FieldError(f"expected one of the fields 'prompt' and 'messages', found {len(given)}")
    if "messages" in row:
        return chat_request(engine, read_messages(row["messages"], "messages"), params)
    prompt = require(row, "prompt", (str, list), "a string or a list of token ids")
    if not isinstance(prompt, str) and not all(type(token_id) is int for token_id in prompt):
        raise FieldError("field 'prompt' is a list with something else than integers; expected token ids")
    return text_request(engine, prompt, params)


def _stop_strings(row: JsonObject) -> tuple[str, ...]:
    stop = require(row, "stop", (str, list), "a string or a list of strings")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(entry, str) and entry for entry in stops):
        raise FieldError("field 'stop' holds something else than non-empty strings")
    return stops


def row_seed(seed: int | None, number: int, rule: int) -> int | None:
    """The seed of line ``number`` (from 1): equal prompts get different answers, a resumed row its own.

    Rule 1 is what runs follow that recorded none.
    """
    if rule == 1:
        return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:7], "big")
    return derive_seed(seed, number - 1)
