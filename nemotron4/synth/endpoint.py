"""One endpoint of a run: its model, how many calls may be under way, what they cost, when to give up."""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque

from nemotron4.client import (
    AdaptiveLimit,
    ChatModel,
    ClientError,
    FakeBehaviour,
    FakeChatModel,
    GenerateChatModel,
    OpenAIChatModel,
    TransientError,
)
from nemotron4.errors import ConfigError, Nemotron4Error
from nemotron4.records import JsonObject
from nemotron4.synth.recipe import EndpointConfig, RetryConfig


class EndpointDownError(Nemotron4Error):
    """No connection for too long, or the endpoint refuses every call. The run stops; nothing is lost."""


class StoppedError(Exception):
    """The run is ending: no new call starts. The work stays ready."""


class ModelEndpoint:
    """Slots for calls. A slot is held until the reply is on disk: a kill repeats at most what is held."""

    def __init__(self, name: str, config: EndpointConfig, model: ChatModel, retry: RetryConfig) -> None:
        self.name = name
        self.config = config
        self.model = model
        self.limit = AdaptiveLimit(maximum=config.max_in_flight)
        self.num_successes = 0
        self.trouble: str | None = None  # the last failure that may pass, until a call succeeds
        self._retry = retry
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._last_contact = time.monotonic()
        self._stop_reason: BaseException | None = None
        self._wake_timer: asyncio.TimerHandle | None = None

    @property
    def identity(self) -> JsonObject:
        """What of the endpoint decides a reply, besides the request."""
        return {"model": self.model.name, "revision": self.config.revision, "form": self.config.form}

    async def acquire(self) -> float:
        """Wait for a slot; returns the start time for ``failed``."""
        while self._stop_reason is None and not self.limit.has_room:
            self._arm_timer()
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        if self._stop_reason is not None:
            raise self._stop_reason
        return self.limit.started()

    def release(self) -> None:
        self.limit.finished()
        self._wake()

    def succeeded(self) -> None:
        self.num_successes += 1
        self.trouble = None
        self._last_contact = time.monotonic()
        self.limit.succeeded()
        self._wake()

    def failed(self, error: ClientError, started_at: float) -> None:
        """Adapt to a failed call; raises EndpointDownError when there is no point in going on."""
        if error.kind in ("unauthorized", "not_found") and self.num_successes == 0:
            raise EndpointDownError(
                f"endpoint {self.name!r}: {error.message}", hint=error.hint or "check url, model and key"
            ) from error
        if not isinstance(error, TransientError):
            self._last_contact = time.monotonic()
            return
        self.trouble = error.message
        self.limit.pushed_back(error, started_at)
        if error.kind != "connection":
            self._last_contact = time.monotonic()
            return
        silent_s = time.monotonic() - self._last_contact
        if silent_s > self._retry.max_outage_s:
            raise EndpointDownError(
                f"endpoint {self.name!r}: no connection for {silent_s:.0f} s: {error.message}",
                hint="start the server, then repeat the same command",
            ) from error

    def stop(self, reason: BaseException) -> None:
        """No further call starts; everyone who waits for a slot gets the reason."""
        self._stop_reason = self._stop_reason or reason
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def price(self, prompt_tokens: int | None, completion_tokens: int | None) -> float:
        config = self.config
        return ((prompt_tokens or 0) * config.price_in + (completion_tokens or 0) * config.price_out) / 1e6

    def _wake(self) -> None:
        room = int(self.limit.limit) - self.limit.in_flight
        while room > 0 and self._waiting and not self.limit.pause_s:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                room -= 1

    def _arm_timer(self) -> None:
        """After Retry-After nobody may be left to wake the waiting calls."""
        if self.limit.pause_s and self._wake_timer is None:
            loop = asyncio.get_running_loop()
            self._wake_timer = loop.call_later(self.limit.pause_s + 0.001, self._pause_ended)

    def _pause_ended(self) -> None:
        self._wake_timer = None
        self._arm_timer()  # the pause may have grown meanwhile
        self._wake()


def connect(name: str, config: EndpointConfig) -> ChatModel:
    """The chat model of an endpoint. ``local`` is made by the command line, which may load torch."""
    if config.form == "fake":
        return FakeChatModel(FakeBehaviour(latency_s=config.fake_latency_ms / 1000), name=config.model)
    if config.form == "generate":
        return GenerateChatModel(
            config.url, template=config.template, name=config.model, timeout_s=config.timeout_s
        )
    if config.form == "local":
        raise ConfigError(
            f"endpoint {name!r}: the form 'local' is for the command line, which loads the model"
        )
    return OpenAIChatModel(
        config.url,
        config.model,
        api_key=_api_key(name, config),
        timeout_s=config.timeout_s,
        extra_body=config.extra_body,
        reward_form=config.reward_form,
    )


def _api_key(name: str, config: EndpointConfig) -> str | None:
    """The key itself never stands in a recipe, because recipes are copied next to the data."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env)
    if not key:
        raise ConfigError(
            f"endpoint {name!r}: the environment variable {config.api_key_env} is empty",
            hint=f"export {config.api_key_env}=... before the run",
        )
    return key
