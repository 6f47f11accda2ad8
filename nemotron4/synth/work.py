"""One piece of work under way: its calls are looked up in the ledger first, paid second, stored at once."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nemotron4.client import (
    BadContentError,
    ClientError,
    Reply,
    RetryPolicy,
    Reward,
    Sampling,
    TextLogprob,
    TransientError,
)
from nemotron4.client.own_code import OwnCode
from nemotron4.records import JsonObject, Message
from nemotron4.synth.duplicates import pack_vector
from nemotron4.synth.endpoint import ModelEndpoint, StoppedError
from nemotron4.synth.recipe import Budget, RetryConfig
from nemotron4.synth.rows import call_key, call_seed, digest
from nemotron4.synth.stage import PromptBook
from nemotron4.synth.tables import Effects, StoredReply
from nemotron4.synth.writer import GroupCommit, Ledger

Made = TypeVar("Made")
REPAIR_SAMPLES = 500_000  # far from every sample that a stage asks for


@dataclass
class Spending:
    """What the run has paid so far, earlier starts included. ``shard``: (index, number) of this part."""

    budget: Budget
    shard: tuple[int, int] = (0, 1)
    calls: int = 0
    tokens: int = 0
    money: float = 0.0
    in_flight: int = 0

    def exhausted(self) -> str | None:
        """The budget that one more call would break. Calls under way count with the mean so far."""
        index, number = self.shard
        expected = self.calls + self.in_flight
        # The shards' parts add up to the whole, also where some of them get none.
        calls = self.budget.calls // number + (index < self.budget.calls % number)
        if self.budget.calls and expected + 1 > calls:
            return f"{calls} calls"
        share = expected / self.calls if self.calls else 1.0
        tokens = self.budget.tokens / number
        if tokens and self.tokens * share >= tokens:
            return f"{tokens:.0f} tokens"
        money = self.budget.money / number
        if money and self.money * share >= money:
            return f"{money:g} in money"
        return None


class Postponed(Exception):  # noqa: N818 - not an error of the work
    """A call failed often for reasons that may pass: the work stays ready for the next start."""


@dataclass
class Shared:
    """What all pieces of work of a run share."""

    ledger: Ledger
    commit: GroupCommit
    endpoints: Mapping[str, ModelEndpoint]
    prompts: PromptBook
    retry: RetryConfig
    spending: Spending
    seed: int
    has_old_replies: bool  # of an earlier start; a fresh run need not look
    stop: Callable[[str, BaseException | None], None]
    own_code: dict[str, OwnCode] = field(default_factory=dict)


@dataclass
class Work:
    """Implements ``stage.Context``. Its calls run one after the other; parallelism is between records.

    A reply is held until the work ends or the next call starts, so that the last one is stored in the same
    transaction as what was made of it.
    """

    shared: Shared
    stage: str
    record: bytes
    attempt: int
    endpoint: str | None
    sampling: Sampling | None
    tally: dict[str, float] = field(default_factory=dict)
    replies: list[StoredReply] = field(default_factory=list)  # paid now or at an earlier start
    _held: list[tuple[StoredReply, ModelEndpoint]] = field(default_factory=list)

    @property
    def max_repairs(self) -> int:
        return self.shared.retry.max_repairs

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        sample: int = 0,
        endpoint: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        top_logprobs: int | None = None,
        schema: JsonObject | None = None,
        choice: tuple[str, ...] = (),
    ) -> Reply:
        target = self._endpoint(endpoint)
        assert self.sampling is not None, f"stage {self.stage} has no sampling"
        sampling = dataclasses.replace(
            self.sampling,
            temperature=self.sampling.temperature if temperature is None else temperature,
            max_tokens=max_tokens or self.sampling.max_tokens,
            top_logprobs=top_logprobs,
            schema=schema,
            choice=choice,
        )
        # A retried failure draws new samples; its old replies would fail again.
        sample += 1000 * self.attempt
        return await self._repaired(
            lambda repair: self._chat_once(target, messages, sampling, sample + REPAIR_SAMPLES * repair)
        )

    async def _repaired(self, ask: Callable[[int], Awaitable[Made]]) -> Made:
        """What ``ask`` makes; an answer that came and cannot be used is asked for again."""
        for repair in range(self.max_repairs):
            try:
                return await ask(repair)
            except BadContentError as error:
                if error.paid_tokens is None:
                    raise
        return await ask(self.max_repairs)

    async def complete(self, text: str, *, sample: int = 0, stop: tuple[str, ...] = ()) -> Reply:
        target = self._endpoint(None)
        assert self.sampling is not None, f"stage {self.stage} has no sampling"
        sampling = dataclasses.replace(self.sampling, stop=stop)
        sample += 1000 * self.attempt
        return await self._repaired(
            lambda repair: self._chat_once(target, text, sampling, sample + REPAIR_SAMPLES * repair)
        )

    async def _chat_once(
        self, target: ModelEndpoint, asked: Sequence[Message] | str, sampling: Sampling, sample: int
    ) -> Reply:
        """Ask about messages, or let a raw text be completed."""
        if sampling.temperature > 0:
            seed = call_seed(self.shared.seed, self.record, self.stage, sample)
            sampling = dataclasses.replace(sampling, seed=seed)
        messages = (Message("user", asked),) if isinstance(asked, str) else asked
        request = target.model.chat_request(messages, sampling)
        if isinstance(asked, str):
            request = {"complete": True, **request}

        async def call() -> tuple[JsonObject, int | None, int | None]:
            if isinstance(asked, str):
                reply = await target.model.complete(asked, sampling)
            else:
                reply = await target.model.chat(asked, sampling)
            if reply.finish_reason == "content_filter":  # half an answer at best
                cut = BadContentError("the endpoint's filter cut the reply", kind="content_filter")
                cut.paid_tokens = reply.prompt_tokens or 0, reply.completion_tokens or 0
                raise cut
            stored: JsonObject = {"text": reply.text, "finish": reply.finish_reason, "model": reply.model}
            if reply.logprobs is not None:
                stored["logprobs"] = reply.logprobs
            if reply.thoughts is not None:
                stored["thoughts"] = reply.thoughts
            return stored, reply.prompt_tokens, reply.completion_tokens

        stored = await self._call(target, request, sample, call)
        return Reply(
            text=stored.reply["text"],
            finish_reason=stored.reply["finish"],
            model=stored.reply["model"],
            prompt_tokens=stored.prompt_tokens,
            completion_tokens=stored.completion_tokens,
            logprobs=_logprobs(stored.reply.get("logprobs")),
            thoughts=stored.reply.get("thoughts"),
        )

    async def score(self, messages: Sequence[Message], *, endpoint: str | None = None) -> Reward:
        target = self._endpoint(endpoint)
        request = {"score": target.model.name, "messages": [message.to_json() for message in messages]}

        async def call() -> tuple[JsonObject, int | None, int | None]:
            reward = await target.model.score(messages)
            return {"attributes": reward.attributes, "scalar": reward.scalar}, None, None

        stored = await self._repaired(lambda repair: self._call(target, request, repair, call))
        return Reward(attributes=stored.reply["attributes"], scalar=stored.reply["scalar"])

    async def embed(self, text: str) -> None:
        target = self._endpoint(None)

        async def call() -> tuple[JsonObject, int | None, int | None]:
            found = await target.model.embed(text)
            return {"vector": pack_vector(found.vector)}, found.prompt_tokens, None

        request = {"embed": target.model.name, "text": text, **target.config.sent}
        await self._repaired(lambda repair: self._call(target, request, repair, call))

    async def run_python(self, function: str, row: JsonObject, *, batch_size: int, timeout_s: float) -> Any:
        if function not in self.shared.own_code:
            self.shared.own_code[function] = OwnCode(function, batch_size=batch_size, timeout_s=timeout_s)
        return await self.shared.own_code[function].call(row)

    def prompt(self, name: str, **values: object) -> str:
        return self.shared.prompts.render(name, values)

    def random(self, purpose: str) -> random.Random:
        return random.Random(digest("choice", self.shared.seed, self.record.hex(), self.stage, purpose))

    def count(self, name: str, value: float = 1.0) -> None:
        self.tally[name] = self.tally.get(name, 0.0) + value

    async def finish(self, effects: Effects) -> None:
        """Store the end of the work with the replies still held; free their slots when it is durable."""
        effects.replies = [reply for reply, _ in self._held]
        for name, value in self.tally.items():
            effects.tally[name] = effects.tally.get(name, 0.0) + value
        endpoints = [endpoint for _, endpoint in self._held]
        self._held, self.tally = [], {}
        try:
            await self.shared.commit.store(effects)
        finally:
            for endpoint in endpoints:
                endpoint.release()

    def abandon(self) -> None:
        """The work stays ready; what was paid is stored."""
        self._flush()

    def _endpoint(self, name: str | None) -> ModelEndpoint:
        chosen = name or self.endpoint
        assert chosen is not None, f"stage {self.stage} has no endpoint"
        return self.shared.endpoints[chosen]

    async def _call(
        self,
        target: ModelEndpoint,
        request: JsonObject,
        sample: int,
        call: Callable[[], Awaitable[tuple[JsonObject, int | None, int | None]]],
    ) -> StoredReply:
        key = call_key({"request": request, "endpoint": target.config.identity}, self.record, sample)
        if self.shared.has_old_replies:
            stored = self.shared.ledger.reply(self.record, key)
            if stored is not None:
                self.replies.append(stored)
                return stored
        self._flush()
        reply, prompt_tokens, completion_tokens, latency_s, attempts = await self._pay(target, call)
        stored = StoredReply(
            self.record, key, self.stage, sample, reply,
            prompt_tokens, completion_tokens, int(latency_s * 1000), attempts,
        )  # fmt: skip
        budget = self.shared.spending.budget
        if prompt_tokens is None and "score" not in request and (budget.tokens or budget.money):
            target.uncounted()
        self._account(target, prompt_tokens or 0, completion_tokens or 0, latency_s=latency_s)
        self._held.append((stored, target))
        self.replies.append(stored)
        return stored

    async def _pay(self, target: ModelEndpoint, call: Callable[[], Awaitable[Any]]) -> tuple[Any, ...]:
        """The reply, its latency and the number of attempts; the slot stays taken."""
        retry = self.shared.retry
        policy = RetryPolicy(first_wait_s=retry.first_wait_s, max_wait_s=retry.max_wait_s)
        spending = self.shared.spending
        tries = attempts = 0
        while True:
            tries += 1
            started_at = await target.acquire()
            exhausted = spending.exhausted()
            if exhausted is not None:
                target.release()
                self.shared.stop(f"the budget of {exhausted} is reached", None)
                raise StoppedError
            spending.in_flight += 1
            successes = target.num_successes
            try:
                reply, prompt_tokens, completion_tokens = await call()
            except ClientError as error:
                self._account_failure(target, error)
                target.release()
                target.failed(error, started_at)
                # While the endpoint serves nobody, its own patience decides, not the number of attempts.
                attempts += target.num_successes > successes or retry.max_attempts == 1
                if not isinstance(error, TransientError):
                    raise
                if attempts >= retry.max_attempts:
                    if retry.fail_transient:
                        raise
                    raise Postponed(error.message) from error
                failure = error
            except BaseException:
                target.release()
                raise
            else:
                target.succeeded()
                return reply, prompt_tokens, completion_tokens, time.monotonic() - started_at, tries
            finally:
                spending.in_flight -= 1
            draw = random.Random(self.record + bytes([tries % 256])).random()
            await target.pause(policy.wait_s(min(tries, 16), failure, draw))

    def _account_failure(self, target: ModelEndpoint, error: ClientError) -> None:
        """What came and cannot be used was paid: it is in the ledger before the next call."""
        self.count("calls_failed")
        if error.paid_tokens is None:
            return
        self._account(target, *error.paid_tokens, latency_s=0.0)
        self.count("calls_unusable")
        paid = {name: self.tally.pop(name) for name in list(self.tally) if name in SPENDING_COUNTERS}
        self.shared.commit.store(Effects(stage=self.stage, tally=paid)).add_done_callback(
            lambda done: _free(done, ())
        )

    def _account(
        self, target: ModelEndpoint, prompt_tokens: int, completion_tokens: int, *, latency_s: float
    ) -> None:
        money = target.price(prompt_tokens, completion_tokens)
        spending = self.shared.spending
        spending.calls += 1
        spending.tokens += prompt_tokens + completion_tokens
        spending.money += money
        target.spent(prompt_tokens + completion_tokens)
        self.count("calls")
        self.count("latency_s", latency_s)
        self.count("prompt_tokens", prompt_tokens)
        self.count("completion_tokens", completion_tokens)
        if money:
            self.count("money", money)

    def _flush(self) -> None:
        """Store the held replies and what was spent; their slots are free when that is durable."""
        if not self._held and not self.tally.keys() & set(SPENDING_COUNTERS):
            return
        held, tally = self._held, self.tally
        paid = {name: tally.pop(name) for name in list(tally) if name in SPENDING_COUNTERS}
        self._held = []
        future = self.shared.commit.store(
            Effects(stage=self.stage, replies=[reply for reply, _ in held], tally=paid)
        )
        future.add_done_callback(lambda done: _free(done, [endpoint for _, endpoint in held]))


def _logprobs(stored: Any) -> tuple[TextLogprob, ...] | None:
    """From a reply just paid, or from the JSON of one in the ledger."""
    if stored is None:
        return None
    return tuple(
        entry
        if isinstance(entry, TextLogprob)
        else TextLogprob(
            entry["token"], entry["logprob"], tuple((token, value) for token, value in entry["top"])
        )
        for entry in stored
    )


SPENDING_COUNTERS = (
    "calls", "calls_failed", "calls_unusable", "latency_s", "prompt_tokens", "completion_tokens", "money",
)  # fmt: skip


def _free(done: asyncio.Future[None], endpoints: Sequence[ModelEndpoint]) -> None:
    done.exception()  # the writer's failure also reaches the work's own end
    for endpoint in endpoints:
        endpoint.release()
