"""One row of a file to its answers: samples of a prompt, rewards next to them, or OpenAI's batch form."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron4.cli.batch_rows import BatchRoutes, is_batch_row
from nemotron4.cli.rows import carried, parse_json, read_request, row_samples, row_seed
from nemotron4.client.interface import BadContentError, ChatModel, HopelessError
from nemotron4.client.retry import call_with_retries
from nemotron4.engine import InferenceEngine, SamplingParams, SamplingRequest
from nemotron4.errors import EngineBusyError, Nemotron4Error, RequestError, TemplateError, TokenizerError
from nemotron4.records import FieldError, Generation, JsonObject, Message
from nemotron4.synth.judges import RewardJudge
from nemotron4.text.answers import run
from nemotron4.text.messages import read_messages

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
        return await self._scored(messages, lines, [each.text for each in generations])

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
            texts = [choice["message"]["content"] or "" for choice in body["choices"]]
            body["choices"] = await self._scored(messages, body["choices"], texts)
        return [answer]

    async def _scored(
        self, messages: Sequence[Message], samples: list[JsonObject], texts: Sequence[str]
    ) -> list[JsonObject]:
        """The samples with their rewards; the best one alone if that is wanted."""

        async def score(text: str) -> JsonObject:
            judge = self._wanted.judge
            assert judge is not None, "the caller has looked"
            turns = [*messages, Message("assistant", text)]
            reward = await call_with_retries(lambda: judge.score(turns))
            scalar = RewardJudge().scalar(reward) if reward.scalar is None else reward.scalar
            return {"reward": scalar, "attributes": dict(reward.attributes)}

        rewards = await asyncio.gather(*map(score, texts))
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
