"""Rewards of a reward model: loaded in this process, or behind ``POST /score`` of a server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from nemotron4.client import BadContentError, ClientError, OpenAIChatModel, RetryPolicy, call_with_retries
from nemotron4.errors import ConfigError, RequestError, TemplateError, unknown_name
from nemotron4.inference.reward import RewardEngine, load_reward
from nemotron4.records import ATTRIBUTES, Message
from nemotron4.training.policy_settings import PREVIOUS, RewardSource
from nemotron4.training.reference import model_hash
from nemotron4.training.rollouts import Answer, Verdict

MAX_IN_FLIGHT = 32
RETRIES = RetryPolicy(max_attempts=5, max_wait_s=10.0)


def conversation(answer: Answer) -> tuple[Message, ...]:
    assert not isinstance(answer.prompt, str), "rows of rendered text are refused when they are read"
    return (*answer.prompt, Message("assistant", answer.text))


def _checked_attribute(source: RewardSource) -> str:
    known = ("scalar", *ATTRIBUTES)
    if source.attribute not in known:
        message, hint = unknown_name("attribute", source.attribute, known)
        raise ConfigError(message, hint=hint)
    return source.attribute


class ModelJudge:
    """A reward model in this process, on the policy's device. An answer that does not fit is not judged."""

    def __init__(self, source: RewardSource, device: str) -> None:
        if source.model == PREVIOUS:
            raise ConfigError(
                "reward model 'previous' is the reward stage before this one in a chain",
                hint="name a checkpoint, or put the stage into a chain behind one of kind reward",
            )
        assert source.model is not None, "the recipe has checked it"
        self._attribute = _checked_attribute(source)
        self._engine: RewardEngine = load_reward(source.model, device=device)
        self.identity = model_hash(self._engine.model)

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(answers)
        rows: dict[int, list[int]] = {}
        for place, answer in enumerate(answers):
            try:
                rows[place] = self._engine.encode(conversation(answer))
            except (RequestError, TemplateError) as error:
                verdicts[place] = Verdict(None, error.message)
        rewards = self._engine.score_ids(list(rows.values()))
        for place, reward in zip(rows, rewards, strict=True):
            value = reward.scalar if self._attribute == "scalar" else reward.attributes[self._attribute]
            verdicts[place] = Verdict(value)
        return [verdict for verdict in verdicts if verdict is not None]


class HttpJudge:
    """``POST /score`` of a server. A call that fails is repeated; one that keeps failing gives no reward."""

    def __init__(self, source: RewardSource) -> None:
        assert source.url is not None, "the recipe has checked it"
        self._url = source.url
        self._attribute = _checked_attribute(source)
        self._api_key = None
        if source.api_key_env is not None:
            self._api_key = os.environ.get(source.api_key_env)
            if not self._api_key:
                raise ConfigError(
                    f"reward of kind 'http': the environment variable {source.api_key_env} is empty",
                    hint=f"export {source.api_key_env}=... before the run",
                )
        self.identity = ""  # the server may change at any time; the recipe names it

    def __call__(self, answers: Sequence[Answer]) -> list[Verdict]:
        return asyncio.run(self._judge_all(answers))

    async def _judge_all(self, answers: Sequence[Answer]) -> list[Verdict]:
        model = OpenAIChatModel(self._url, "reward", api_key=self._api_key)
        room = asyncio.Semaphore(MAX_IN_FLIGHT)

        async def judge(place: int, answer: Answer) -> Verdict:
            async with room:
                try:
                    return await self._judge(model, place, answer)
                except ClientError as error:
                    return Verdict(None, error.message)

        try:
            return list(await asyncio.gather(*(judge(i, answer) for i, answer in enumerate(answers))))
        finally:
            await model.close()

    async def _judge(self, model: OpenAIChatModel, place: int, answer: Answer) -> Verdict:
        messages = conversation(answer)
        reward = await call_with_retries(lambda: model.score(messages), policy=RETRIES, seed=place)
        if self._attribute != "scalar":
            if self._attribute not in reward.attributes:
                raise BadContentError(f"{self._url}: no attribute {self._attribute!r}", kind="no_reward")
            return Verdict(reward.attributes[self._attribute])
        if reward.scalar is None:
            raise BadContentError(
                f"{self._url}: attributes without a reward; name one of them as attribute", kind="no_reward"
            )
        return Verdict(reward.scalar)
