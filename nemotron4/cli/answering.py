"""One row of a file to its answers: samples of a prompt, rewards next to them, or OpenAI's batch form."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from nemotron4.cli.rows import carried, parse_json, read_request, row_samples, row_seed
from nemotron4.client.interface import BadContentError, ChatModel, HopelessError
from nemotron4.client.retry import call_with_retries
from nemotron4.engine import Grammar, InferenceEngine, SamplingParams, SamplingRequest
from nemotron4.errors import (
    EngineBusyError,
    Nemotron4Error,
    RequestError,
    TemplateError,
    TokenizerError,
    unknown_name,
)
from nemotron4.json_form import to_json
from nemotron4.records import FieldError, Generation, JsonObject, Message, require
from nemotron4.server.app import POST_ONLY, create_app
from nemotron4.server.settings import ServerSettings
from nemotron4.server.structured import StructuredFields
from nemotron4.synth.judges import RewardJudge
from nemotron4.text.answers import EngineStoppedError, run
from nemotron4.text.messages import read_messages

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


# What a scorer may say of one row; every other refusal would meet all rows and ends the run.
ROW_KINDS = ("bad_request", "context_length", "content_filter")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What every row is answered with unless it says something else. ``judge`` scores each sample."""

    params: SamplingParams
    n: int = 1
    judge: ChatModel | None = None
    keeps_best: bool = False
    served_names: tuple[str, ...] = ()  # what batch rows may call the model


class RowAnswers:
    """Answers rows with one engine. A row that cannot be served becomes an error record."""

    def __init__(
        self, engine: InferenceEngine, wanted: Wanted, *, seed_rule: int, count_token: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._wanted = wanted
        self._seed_rule = seed_rule
        self._count_token = count_token
        self._routes: BatchRoutes | None = None

    async def answer(self, number: int, line: bytes) -> list[JsonObject]:
        """The output lines of input line ``number``."""
        row: JsonObject = {}
        seed = row_seed(self._wanted.params.seed, number, self._seed_rule)
        try:
            row = parse_json(line)
            work = self._routed if is_batch_row(row) else self._own
            answers = await work(row, number, seed)
            json.dumps(answers, allow_nan=False)
        except (
            FieldError,
            RequestError,
            TemplateError,
            TokenizerError,
            BadContentError,
            ValueError,
        ) as error:
            return [_failed(row, number, error)]
        except HopelessError as error:
            if error.kind not in ROW_KINDS:
                raise
            return [_failed(row, number, error)]
        return answers

    async def close(self) -> None:
        """Give up the connections; the engine and a reward model in this process stay."""
        if self._routes is not None:
            await self._routes.close()
        if self._wanted.judge is not None:
            await self._wanted.judge.close()

    async def _own(self, row: JsonObject, number: int, seed: int | None) -> list[JsonObject]:
        wanted = self._wanted
        request = read_request(self._engine, row, dataclasses.replace(wanted.params, seed=seed))
        requests = row_samples(request, row, wanted.n, run_seed=wanted.params.seed, number=number)
        generations = await asyncio.gather(*map(self._generate, requests))
        lines = [
            {**carried(row), **({"sample": i} if len(requests) > 1 else {}), **each.to_json()}
            for i, each in enumerate(generations)
        ]
        if wanted.judge is None:
            return lines
        if "messages" not in row:
            raise FieldError("only a row with 'messages' can be scored")
        messages = read_messages(row["messages"], "messages")
        return await self._scored(messages, lines, [Message("assistant", g.text) for g in generations])

    async def _routed(self, row: JsonObject, number: int, seed: int | None) -> list[JsonObject]:
        """A row of OpenAI's batch files, answered as the server would."""
        wanted = self._wanted
        if self._routes is None:
            params = dataclasses.replace(wanted.params, seed=None)
            self._routes = BatchRoutes(self._engine, params, wanted.n, wanted.served_names)
        answer = await self._routes.answer(row, number, seed)
        if wanted.judge is not None and answer["response"]["status_code"] == 200:
            body = answer["response"]["body"]
            if body["object"] != "chat.completion":
                raise FieldError("only a row of /v1/chat/completions can be scored")
            messages = read_messages(row["body"]["messages"], "messages")
            turns = read_messages([choice["message"] for choice in body["choices"]], "choices")
            if row["body"].get("continue_final_message"):  # one turn, of which the row has the beginning
                start = "" if row["body"].get("echo") else messages[-1].content
                turns = tuple(dataclasses.replace(turn, content=start + turn.content) for turn in turns)
                messages = messages[:-1]
            body["choices"] = await self._scored(messages, body["choices"], turns)
        return [answer]

    async def _scored(
        self, messages: Sequence[Message], samples: list[JsonObject], answers: Sequence[Message]
    ) -> list[JsonObject]:
        """The samples with their rewards; the best one alone if that is wanted."""

        async def score(answer: Message) -> JsonObject:
            judge = self._wanted.judge
            assert judge is not None, "the caller has looked"
            reward = await call_with_retries(lambda: judge.score([*messages, answer]))
            scalar = RewardJudge().scalar(reward) if reward.scalar is None else reward.scalar
            return {"reward": scalar, "attributes": dict(reward.attributes)}

        rewards = await asyncio.gather(*map(score, answers))
        scored = [{**sample, **reward} for sample, reward in zip(samples, rewards, strict=True)]
        # The first of equals: the same command then keeps the same sample.
        return [max(scored, key=_reward)] if self._wanted.keeps_best else scored

    async def _generate(self, request: SamplingRequest) -> Generation:
        while True:
            try:
                answer = await run(self._engine, request, on_text=lambda _: self._count_token())
                return answer.generation()
            except EngineBusyError as busy:
                await asyncio.sleep(busy.retry_after_s)


def _reward(sample: JsonObject) -> float:
    return float(sample["reward"])


def _failed(row: JsonObject, number: int, error: Exception) -> JsonObject:
    message = error.message if isinstance(error, Nemotron4Error) else str(error)
    if is_batch_row(row):
        name: Any = row["custom_id"]
        told = {"code": "invalid_row", "message": message}
        return {"id": f"batch_req_{number}", "custom_id": name, "response": None, "error": told}
    return {**carried(row), "line": number, "error": message}


def is_failed(line: JsonObject) -> bool:
    """True for an output line without an answer."""
    return line.get("error") is not None or (line.get("response") or {}).get("status_code", 200) >= 400


def num_tokens(line: JsonObject) -> int:
    """New tokens of an output line."""
    if "token_ids" in line:
        return len(line["token_ids"])
    body = (line.get("response") or {}).get("body") or {}
    return int((body.get("usage") or {}).get("completion_tokens", 0))
