"""One endpoint of a run: its model, how many calls may be under way, what they cost, when to give up."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from nemotron4.client import (
    AdaptiveLimit,
    ChatModel,
    ClientError,
    FakeBehaviour,
    FakeChatModel,
    GenerateChatModel,
    OpenAIChatModel,
    RateLimit,
    TransientError,
    api_key,
)
from nemotron4.errors import ConfigError, Nemotron4Error
from nemotron4.synth.recipe import EndpointConfig, RetryConfig

LONG_WAIT_S = 5.0  # a Retry-After that a user should know of at once


class EndpointDownError(Nemotron4Error):
    """No success for too long, or the endpoint refuses every call. The run stops; nothing is lost."""


class StoppedError(Exception):
    """The run is ending: no new call starts. The work stays ready."""


class ModelEndpoint:
    """Slots for calls. A slot is held until the reply is on disk: a kill repeats at most what is held.

    ``notice`` is told at once when the endpoint asks to wait for long. ``num_shards`` share its limits.
    """

    def __init__(
        self,
        name: str,
        config: EndpointConfig,
        model: ChatModel,
        retry: RetryConfig,
        notice: Callable[[str], None] = lambda line: None,
        num_shards: int = 1,
    ) -> None:
        self.name = name
        self.config = config
        self.model = model
        self.limit = AdaptiveLimit(maximum=config.max_in_flight)
        self.num_successes = 0
        self.trouble: str | None = None  # the last failure that may pass, until a call succeeds
        self._retry = retry
        self._notice = notice
        # 0 is no limit, so a share of one is at least 1.
        self._rate = RateLimit(
            requests=max(config.requests_per_minute // num_shards, min(config.requests_per_minute, 1)),
            tokens=max(config.tokens_per_minute // num_shards, min(config.tokens_per_minute, 1)),
        )
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._pauses: set[asyncio.Future[None]] = set()
        self._trouble_since: float | None = None  # the first failure after the last success
        self._told_until = 0.0
        self._is_told_uncounted = False
        self._stop_reason: BaseException | None = None
        self._wake_timer: asyncio.TimerHandle | None = None

    async def acquire(self) -> float:
        """Wait for a slot; returns the start time for ``failed``."""
        while self._stop_reason is None and not self._has_room():
            self._arm_timer()
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        if self._stop_reason is not None:
            raise self._stop_reason
        self._rate.started(time.monotonic())
        return self.limit.started()

    async def pause(self, seconds: float) -> None:
        """Sleep; raises the reason at once when the run stops."""
        if self._stop_reason is None:
            loop = asyncio.get_running_loop()
            ended: asyncio.Future[None] = loop.create_future()
            self._pauses.add(ended)
            timer = loop.call_later(seconds, _wake_up, ended)
            try:
                await ended
            finally:
                timer.cancel()
                self._pauses.discard(ended)
        if self._stop_reason is not None:
            raise self._stop_reason

    def release(self) -> None:
        self.limit.finished()
        self._wake()

    def spent(self, tokens: int) -> None:
        self._rate.spent(time.monotonic(), tokens)

    def succeeded(self) -> None:
        self.num_successes += 1
        self.trouble = self._trouble_since = None
        self.limit.succeeded()
        self._wake()

    def failed(self, error: ClientError, started_at: float) -> None:
        """Adapt to a failed call; raises EndpointDownError when there is no point in going on."""
        is_refused = error.kind in ("unauthorized", "not_found")
        # A 403 after successes may be about one prompt alone.
        if error.kind == "quota" or (is_refused and (self.num_successes == 0 or error.status != 403)):
            hint = "add to the quota" if error.kind == "quota" else error.hint or "check url, model and key"
            raise EndpointDownError(
                f"endpoint {self.name!r}: {error.message}", hint=f"{hint}, then repeat the same command"
            ) from error
        if not isinstance(error, TransientError):
            return
        now = time.monotonic()
        self.trouble = error.message
        self.limit.pushed_back(error, started_at)
        wait_s = error.retry_after_s or 0.0
        self._tell_wait(now, wait_s, error.message)
        # The wait that the endpoint asked for is no outage.
        since = now if self._trouble_since is None else self._trouble_since
        self._trouble_since = max(since, now + wait_s) if wait_s else since
        silent_s = now - self._trouble_since
        if silent_s > self._retry.max_outage_s:
            what = "no connection" if error.kind == "connection" else "no success"
            raise EndpointDownError(
                f"endpoint {self.name!r}: {what} for {silent_s:.0f} s: {error.message}",
                hint="see that the server runs, then repeat the same command",
            ) from error

    def uncounted(self) -> None:
        """A reply came without its tokens: a budget of them, or of money, cannot be kept."""
        if not self._is_told_uncounted:
            self._is_told_uncounted = True
            self._notice(f"endpoint {self.name!r} does not tell tokens: they count as 0 in the budget")

    def _tell_wait(self, now: float, wait_s: float, message: str) -> None:
        """Once for all calls that are told to wait until about the same moment."""
        if wait_s >= LONG_WAIT_S and now + wait_s > self._told_until + LONG_WAIT_S:
            self._told_until = now + wait_s
            until = time.strftime("%d %B %Y %H:%M:%S", time.localtime(time.time() + wait_s))
            self._notice(f"endpoint {self.name!r} asks to wait {wait_s:,.0f} s, until {until}: {message}")

    def stop(self, reason: BaseException) -> None:
        """No further call starts; everyone who waits for a slot gets the reason."""
        self._stop_reason = self._stop_reason or reason
        for waiter in (*self._waiting, *self._pauses):
            _wake_up(waiter)
        self._waiting.clear()

    def price(self, prompt_tokens: int | None, completion_tokens: int | None) -> float:
        config = self.config
        return ((prompt_tokens or 0) * config.price_in + (completion_tokens or 0) * config.price_out) / 1e6

    def _blocked_s(self) -> float:
        """Seconds until Retry-After and the limits per minute let one more call start."""
        return max(self.limit.pause_s, self._rate.wait_s(time.monotonic(), self.limit.in_flight))

    def _has_room(self) -> bool:
        return self.limit.has_room and not self._blocked_s()

    def _wake(self) -> None:
        room = int(self.limit.limit) - self.limit.in_flight
        while room > 0 and self._waiting and not self._blocked_s():
            if _wake_up(self._waiting.popleft()):
                room -= 1
        if self._waiting:
            self._arm_timer()

    def _arm_timer(self) -> None:
        """After a wait by the clock nobody may be left to wake the waiting calls."""
        blocked_s = self._blocked_s()
        if blocked_s and self._wake_timer is None:
            loop = asyncio.get_running_loop()
            self._wake_timer = loop.call_later(blocked_s + 0.001, self._pause_ended)

    def _pause_ended(self) -> None:
        self._wake_timer = None
        self._arm_timer()  # the pause may have grown meanwhile
        self._wake()


def _wake_up(waiter: asyncio.Future[None]) -> bool:
    is_asleep = not waiter.done()
    if is_asleep:
        waiter.set_result(None)
    return is_asleep


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
        api_key=api_key(config.api_key_env, f"endpoint {name!r}"),
        timeout_s=config.timeout_s,
        extra_body=config.extra_body,
        reward_form=config.reward_form,
    )
