"""Rows of OpenAI's batch files, answered by the server's own routes without a port."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from nemotron4.engine import Grammar, InferenceEngine, SamplingParams
from nemotron4.errors import unknown_name
from nemotron4.json_form import to_json
from nemotron4.records import FieldError, JsonObject, require
from nemotron4.server.app import POST_ONLY, create_app
from nemotron4.server.settings import ServerSettings
from nemotron4.server.structured import StructuredFields
from nemotron4.text.answers import EngineStoppedError

FIELDS = ("custom_id", "method", "url", "body")
# Our settings by the names that a body has for them.
BODY_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "shows_stop": "include_stop_str_in_output",
}
SAME_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "logit_bias", "stop_token_ids", "ignore_eos"),
)


def is_batch_row(row: JsonObject) -> bool:
    return "custom_id" in row


class BatchRoutes:
    """What a body leaves out follows ``defaults`` and ``n``, as in every other row."""

    def __init__(
        self, engine: InferenceEngine, defaults: SamplingParams, n: int, served_names: tuple[str, ...]
    ) -> None:
        settings = ServerSettings(page=None, served_names=served_names, max_body_bytes=2**30)
        app = create_app(engine, settings, access_log=lambda context, trace: None)
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=None
        )
        self._defaults = body_of(defaults) | ({} if n == 1 else {"n": n})
        self._logprobs = defaults.logprobs

    async def answer(self, row: JsonObject, number: int, seed: int | None) -> JsonObject:
        """The row of the output file. FieldError for one that is no request of this form."""
        for name in row:
            if name not in FIELDS:
                message, hint = unknown_name("field", name, FIELDS)
                raise FieldError(f"{message}; {hint}")
        if row.get("method", "POST") != "POST":
            raise FieldError(f"field 'method' is {row['method']!r:.40}; expected 'POST'")
        url = require(row, "url", str, f"one of {', '.join(POST_ONLY)}")
        if url not in POST_ONLY:
            raise FieldError(f"field 'url' is {url!r:.60}; expected one of {', '.join(POST_ONLY)}")
        body = require(row, "body", dict, "an object")
        if body.get("stream"):
            raise FieldError("a row of a file has no stream; leave it out of the body")
        response = await self._post(url, self._completed(url, body, seed), number)
        shown = {
            "status_code": response.status_code,
            "request_id": response.headers["x-request-id"],
            "body": response.json(),
        }
        return {"id": f"batch_req_{number}", "custom_id": row["custom_id"], "response": shown, "error": None}

    async def close(self) -> None:
        await self._client.aclose()

    def _completed(self, url: str, body: JsonObject, seed: int | None) -> JsonObject:
        """The body with the command's settings where it says nothing."""
        if url == "/v1/embeddings":
            return body
        given = {name for name, value in body.items() if value is not None}
        if "max_completion_tokens" in given:
            given.add("max_tokens")
        if given & {*StructuredFields.model_fields, "tools"}:
            given.add("structured_outputs")
        defaults = {**self._defaults, "seed": seed}
        if self._logprobs is not None:
            defaults["logprobs"] = url == "/v1/chat/completions" or self._logprobs
        return body | {name: value for name, value in defaults.items() if name not in given}

    async def _post(self, url: str, body: JsonObject, number: int) -> httpx.Response:
        while True:
            response = await self._client.post(url, json=body, headers={"X-Request-Id": f"row-{number}"})
            if response.status_code >= 500:
                raise EngineStoppedError(f"row {number}: {response.json()['error']['message']}")
            if response.status_code != 429:
                return response
            await asyncio.sleep(float(response.headers["retry-after"]))


def body_of(params: SamplingParams) -> JsonObject:
    """The settings that differ from ours where nothing is said, as fields of a body."""
    usual, found = SamplingParams(max_new_tokens=0), dict[str, Any]()
    for name in (*BODY_NAMES, *SAME_NAMES):
        value = getattr(params, name)
        if value != getattr(usual, name):
            found[BODY_NAMES.get(name, name)] = to_json(value)
    if params.shows_special:
        found["skip_special_tokens"] = False
    if params.grammar is not None:
        found["structured_outputs"] = _form(params.grammar)
    return found


def _form(grammar: Grammar) -> JsonObject:
    return {grammar.kind: json.loads(grammar.source) if grammar.kind == "choice" else grammar.source}
