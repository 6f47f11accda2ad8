"""One line of an input file as a request: prompt ids, sampling settings, and what is copied to the answer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nemotron4.engine import Grammar, InferenceEngine, SamplingParams, SamplingRequest, derive_seed
from nemotron4.errors import DataError, RequestError, unknown_name
from nemotron4.records import FieldError, JsonObject, load_json, optional_number, require
from nemotron4.server.openai_schemas import MAX_ROWS
from nemotron4.text import structured_output
from nemotron4.text.answers import chat_request, samples, text_request
from nemotron4.text.messages import read_messages

# What a row may say about its own sampling; every other row follows the command's options.
INTEGERS = ("max_new_tokens", "min_new_tokens", "top_k", "seed", "n")
NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# The form of the answer: one of these.
FORMS: Mapping[str, tuple[Any, str, Callable[[Any], Grammar]]] = {
    "json_schema": ((dict, str), "a JSON schema", structured_output.json_schema),
    "regex": (str, "a regular expression", structured_output.regex),
    "choice": (list, "a list of texts", structured_output.choice),
    "grammar": (str, "a grammar", structured_output.grammar),
}
# True or false, by vLLM's names -> the setting here, and whether it says the opposite.
SWITCHES = {
    "ignore_eos": ("ignore_eos", False),
    "include_stop_str_in_output": ("shows_stop", False),
    "skip_special_tokens": ("shows_special", True),
}
MAX_DEPTH = 200  # of a row's brackets: what is copied into an answer must be written and read again
PROMPTS = ("prompt", "messages")
CARRIED = ("id", "meta")
SEED_RULE = 2  # rows are samples of the run's seed: ``derive_seed``
FIELDS = (
    *(*PROMPTS, *CARRIED, *INTEGERS, *NUMBERS, *SWITCHES, *FORMS),
    *("stop", "stop_token_ids", "logit_bias", "logprobs"),
)


def parse_json(line: bytes) -> JsonObject:
    try:
        row = load_json(line, parse_constant=_not_json)
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise FieldError(f"not UTF-8 text: {error.reason}") from error
    except RecursionError as error:
        raise FieldError("it nests too deeply") from error
    except ValueError as error:
        raise FieldError(f"not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise FieldError("the line is not a JSON object")
    if _is_deeper(row, MAX_DEPTH):
        raise FieldError(f"it nests too deeply; the limit is {MAX_DEPTH} brackets")
    return row


def _is_deeper(value: Any, limit: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return limit == 0 or any(_is_deeper(each, limit - 1) for each in inner)


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
    changes.pop("n", None)
    changes |= {name: optional_number(row, name) for name in NUMBERS if row.get(name) is not None}
    if "stop" in row:
        changes["stop_strings"] = (*defaults.stop_strings, *_stop_strings(row))
    if "logprobs" in row:
        changes["logprobs"] = 0 if require(row, "logprobs", bool, "true or false") else None
    if row.get("stop_token_ids") is not None:
        ids = require(row, "stop_token_ids", list, "a list of token ids")
        if not all(type(token_id) is int for token_id in ids):
            raise FieldError("field 'stop_token_ids' holds something else than integers")
        changes["stop_token_ids"] = defaults.stop_token_ids.union(ids)
    if row.get("logit_bias") is not None:
        given = require(row, "logit_bias", dict, "an object of token ids and numbers")
        changes["logit_bias"] = logit_bias(f"{name}={value}" for name, value in given.items())
    for name, (setting, is_opposite) in SWITCHES.items():
        if row.get(name) is not None:
            changes[setting] = require(row, name, bool, "true or false") != is_opposite
    forms = [name for name in FORMS if row.get(name) is not None]
    if len(forms) > 1:
        raise FieldError(f"{' and '.join(forms)} both ask for a form; give one of them")
    for name in forms:
        kind, expected, make = FORMS[name]
        changes["grammar"] = make(require(row, name, kind, expected))
    return _request(engine, row, dataclasses.replace(defaults, **changes))


def row_samples(
    request: SamplingRequest, row: JsonObject, n: int, *, run_seed: int | None, number: int
) -> list[SamplingRequest]:
    """The samples of line ``number``. No two of a run share a seed, unless rows bring seeds of their own."""
    n = row.get("n", n)
    if not 1 <= n <= MAX_ROWS:
        raise FieldError(f"field 'n' is {n}; expected 1 {'or more' if n < 1 else f'to {MAX_ROWS}'}")
    if row.get("seed") is not None:
        return samples(request, n)
    seeds = [request.params.seed, *(derive_seed(run_seed, number - 1, i) for i in range(1, n))]
    params = [dataclasses.replace(request.params, seed=seed) for seed in seeds]
    return [dataclasses.replace(request, params=each) for each in params]


def logit_bias(given: Iterable[str]) -> dict[int, float]:
    """What is added to the logits of tokens: ``ID=NUMBER`` each."""
    bias = {}
    for each in given:
        name, _, value = each.partition("=")
        try:
            bias[int(name)] = float(value)
        except ValueError:
            raise RequestError(f"logit_bias has {each[:60]!r}; expected a token id and a number") from None
    return bias


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
