"""One line of an input file as a request: prompt ids, sampling settings, and what is copied to the answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron4.cli.prompting import chat_params, chat_prompt_ids, text_params, text_prompt_ids
from nemotron4.errors import unknown_name
from nemotron4.inference.interface import InferenceEngine, SamplingParams
from nemotron4.records import FieldError, JsonObject, optional_number, parse_messages, require

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
FIELDS = (*PROMPTS, *CARRIED, *INTEGERS, *NUMBERS, "stop", "logprobs")


@dataclass(frozen=True)
class Request:
    """One row, ready for the engine."""

    prompt_ids: tuple[int, ...]
    params: SamplingParams


def parse_json(line: bytes) -> JsonObject:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise FieldError(f"not UTF-8 text: {error.reason}") from error
    except ValueError as error:
        raise FieldError(f"not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise FieldError("the line is not a JSON object")
    return row


def carried(row: Mapping[str, Any]) -> JsonObject:
    return {name: row[name] for name in CARRIED if row.get(name) is not None}


def read_request(engine: InferenceEngine, row: JsonObject, number: int, defaults: SamplingParams) -> Request:
    for name in row:
        if name not in FIELDS:
            message, hint = unknown_name("field", name, FIELDS)
            raise FieldError(f"{message}; {hint} Other data belongs under 'meta'")
    prompt_ids, params = _prompt(engine, row, defaults)
    changes: dict[str, Any] = {
        name: require(row, name, int, "an integer") for name in INTEGERS if name in row
    }
    changes |= {name: optional_number(row, name) for name in NUMBERS if row.get(name) is not None}
    if "stop" in row:
        changes["stop_strings"] = (*params.stop_strings, *_stop_strings(row))
    if "logprobs" in row:
        changes["logprobs"] = 0 if require(row, "logprobs", bool, "true or false") else None
    if "seed" not in row and params.seed is not None:
        changes["seed"] = row_seed(params.seed, number)
    return Request(tuple(prompt_ids), dataclasses.replace(params, **changes))


def _prompt(
    engine: InferenceEngine, row: JsonObject, defaults: SamplingParams
) -> tuple[list[int], SamplingParams]:
    given = [name for name in PROMPTS if name in row]
    if len(given) != 1:
        raise FieldError(f"expected one of the fields 'prompt' and 'messages', found {len(given)}")
    if "messages" in row:
        messages = parse_messages(row, "messages")
        return chat_prompt_ids(engine, messages), chat_params(engine, defaults)
    prompt = require(row, "prompt", (str, list), "a string or a list of token ids")
    if isinstance(prompt, str):
        return text_prompt_ids(engine, prompt), text_params(engine, defaults)
    if not all(type(token_id) is int for token_id in prompt):
        raise FieldError("field 'prompt' is a list with something else than integers; expected token ids")
    for token_id in prompt:
        if not 0 <= token_id < engine.tokenizer.vocab_size:
            raise FieldError(
                f"field 'prompt' holds token id {token_id}, which is outside the vocabulary; "
                f"expected 0 to {engine.tokenizer.vocab_size - 1}"
            )
    return prompt, text_params(engine, defaults)


def _stop_strings(row: JsonObject) -> tuple[str, ...]:
    stop = require(row, "stop", (str, list), "a string or a list of strings")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(entry, str) and entry for entry in stops):
        raise FieldError("field 'stop' holds something else than non-empty strings")
    return stops


def row_seed(seed: int, number: int) -> int:
    """The seed of one row: equal prompts get different answers, a resumed row the one it would have had."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
