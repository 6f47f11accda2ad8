"""Calls to one endpoint: a concurrency that adapts, retries of what may succeed later, many calls."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nemotron4.client.interface import BadContentError, ClientError, HopelessError, TransientError
from nemotron4.records import JsonObject
from nemotron4.runs import IncompleteError, RowLog, in_flight

Result = TypeVar("Result")
_MIN_FAILURES = 20  # fewer are no outage


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Waits grow by two from ``first_wait_s`` to ``max_wait_s``, each drawn from [half, whole]."""

    max_attempts: int = 8
    first_wait_s: float = 0.5
    max_wait_s: float = 60.0

    def wait_s(self, attempt: int, error: TransientError, draw: float) -> float:
        """Seconds before attempt ``attempt + 1`` (attempts count from 1); never less than Retry-After."""
        backoff = min(self.max_wait_s, self.first_wait_s * 2.0 ** (attempt - 1)) * (0.5 + draw / 2)
        return max(backoff, error.retry_after_s or 0.0)


class AdaptiveLimit:
    """Concurrency of one endpoint: +1 per ``increase_every`` successes, x 0.75 when it pushes back.

    Additive increase, multiplicative decrease: the congestion rule of TCP, with its slow start (+1 per
    success) until the endpoint first pushes back. Calls that were under way when the limit fell do not
    lower it again.
    """

    def __init__(self, *, start: int = 4, maximum: int = 256, increase_every: int = 25) -> None:
        self.limit = float(min(start, maximum))
        self.in_flight = 0
        self._maximum = maximum
        self._increase_every = increase_every
        self._successes = 0
        self._lowered_at = float("-inf")
        self._not_before = 0.0

    @property
    def has_room(self) -> bool:
        return self.in_flight < int(self.limit) and time.monotonic() >= self._not_before

    @property
    def pause_s(self) -> float:
        """Seconds until the endpoint's Retry-After has passed; 0 when calls may start."""
        return max(0.0, self._not_before - time.monotonic())

    def started(self) -> float:
        """Count a call in; the returned time goes to ``failed`` if the call is pushed back."""
        self.in_flight += 1
        return time.monotonic()

    def finished(self) -> None:
        self.in_flight -= 1

    def succeeded(self) -> None:
        self._successes += 1
        is_slow_start = self._lowered_at == float("-inf")
        if self.limit < self._maximum and (is_slow_start or self._successes >= self._increase_every):
            self._successes = 0
            self.limit = min(float(self._maximum), int(self.limit) + 1.0)

    def pushed_back(self, error: TransientError, started_at: float) -> None:
        now = time.monotonic()
        if error.retry_after_s:
            self._not_before = max(self._not_before, now + error.retry_after_s)
        if error.kind in ("rate_limit", "timeout", "server_error") and started_at > self._lowered_at:
            self._lowered_at = now
            self._successes = 0
            self.limit = max(1.0, self.limit * 0.75)


class RateLimit:
    """Requests and tokens within any window of time; 0 is no limit. ``now`` is in seconds of one clock."""

    def __init__(self, *, requests: int = 0, tokens: int = 0, window_s: float = 60.0) -> None:
        self._max_requests, self._max_tokens, self._window_s = requests, tokens, window_s
        self._starts: deque[float] = deque()
        self._spent: deque[tuple[float, int]] = deque()
        self._num_tokens = self._all_tokens = self._all_calls = 0

    def wait_s(self, now: float, num_under_way: int) -> float:
        """Seconds until one more call may start. Calls under way count with the mean of tokens so far."""
        self._forget(now - self._window_s)
        waits = [0.0]
        if self._max_requests and len(self._starts) >= self._max_requests:
            waits.append(self._starts[-self._max_requests] + self._window_s - now)
        mean = self._all_tokens / self._all_calls if self._all_calls else 0.0
        expected = self._num_tokens + mean * (num_under_way + 1)
        if self._max_tokens and self._spent and expected > self._max_tokens:
            waits.append(self._spent[0][0] + self._window_s - now)
        return max(waits)

    def started(self, now: float) -> None:
        if self._max_requests:
            self._starts.append(now)

    def spent(self, now: float, tokens: int) -> None:
        self._all_calls += 1
        self._all_tokens += tokens
        if self._max_tokens and tokens:
            self._spent.append((now, tokens))
            self._num_tokens += tokens

    def _forget(self, before: float) -> None:
        while self._starts and self._starts[0] <= before:
            self._starts.popleft()
        while self._spent and self._spent[0][0] <= before:
            self._num_tokens -= self._spent.popleft()[1]


async def call_with_retries(
    call: Callable[[], Awaitable[Result]],
    *,
    policy: RetryPolicy | None = None,
    seed: int = 0,
    on_retry: Callable[[TransientError], None] = lambda _: None,
) -> Result:
    """The call's result; a TransientError is retried by the policy, every other error passes at once."""
    policy = policy or RetryPolicy()
    draw = random.Random(seed)
    attempt = 0
    while True:
        attempt += 1
        try:
            return await call()
        except TransientError as error:
            if attempt >= policy.max_attempts or error.kind == "quota":
                raise
            on_retry(error)
            await asyncio.sleep(policy.wait_s(attempt, error, draw.random()))


class Outage:
    """Whether an endpoint is gone: requests fail, each after all its attempts, and few or none are answered.

    What is left would fail as slowly: a minute each, for hours.
    """

    def __init__(self, concurrency: int) -> None:
        self._most_in_a_row = max(_MIN_FAILURES, 2 * concurrency)
        self._in_a_row = self._num_failed = self.num_answered = 0

    def answered(self) -> None:
        self.num_answered += 1
        self._in_a_row = 0

    def failed(self) -> bool:
        """Count one more; true if the endpoint is gone."""
        self._num_failed += 1
        self._in_a_row += 1
        is_most = self._num_failed >= max(_MIN_FAILURES, self.num_answered)
        return is_most or self._in_a_row >= self._most_in_a_row


# Failures that say something of the endpoint and nothing of the item.
OF_THE_ENDPOINT = ("unauthorized", "not_found")
FORBIDDEN = 403


def is_of_endpoint(error: ClientError, *, has_answered: bool) -> bool:
    """Whether every other call fails so, too: a run stops then, and no item is booked as failed.

    After answers a 403 may be about one prompt alone.
    """
    return error.kind in OF_THE_ENDPOINT and not (has_answered and error.status == FORBIDDEN)


ERROR = "error"  # a row with this field says why there is no answer: {"kind": ..., "message": ...}


async def ask_missing(
    log: RowLog,
    ids: Sequence[str],
    ask: Callable[[str], Awaitable[JsonObject]],
    *,
    concurrency: int,
    on_rows: Callable[[Sequence[JsonObject]], None],
    max_failures: int | None = 0,
) -> dict[str, JsonObject]:
    """Rows by id: those of the log, and a new one for each id that has none.

    ``ask`` gives the fields of a row and retries by itself. A call that can never succeed, or whose answer is
    unusable, leaves a row with ``error``; one that may succeed later leaves none in the log. When all others
    are done, more than ``max_failures`` of these (None: all) are an IncompleteError, fewer have rows with
    ``error`` in the result. A failure of the endpoint itself (a wrong key, an outage) is raised. ``on_rows``
    is called in a thread with rows that are on the disk.
    """
    failures: dict[str, TransientError] = {}
    outage = Outage(concurrency)
    has_answered = any(ERROR not in row for row in log.rows)

    async def work(name: str) -> JsonObject | None:
        nonlocal has_answered
        try:
            row = {"id": name, **await ask(name)}
            has_answered = True
            outage.answered()
            return row
        except TransientError as error:
            failures[name] = error
            if outage.failed() and len(failures) > (max_failures or 0):
                raise _incomplete(len(failures), len(ids), error) from error
            return None
        except (HopelessError, BadContentError) as error:
            outage.answered()
            if is_of_endpoint(error, has_answered=has_answered):
                raise
            return {"id": name, ERROR: {"kind": error.kind, "message": error.message}}

    def keep(rows: list[JsonObject | None]) -> None:
        finished = [row for row in rows if row is not None]
        log.append(*finished)
        on_rows(finished)

    await in_flight((name for name in ids if name not in log), work, keep, limit=concurrency)
    limit = len(ids) - 1 if max_failures is None else max_failures
    if len(failures) > limit:
        raise _incomplete(len(failures), len(ids), next(iter(failures.values())))
    failed = {
        name: {"id": name, ERROR: {"kind": error.kind, "message": error.message}}
        for name, error in failures.items()
    }
    return {name: failed.get(name) or log[name] for name in ids}


def _incomplete(num_failed: int, num_asked: int, first: TransientError) -> IncompleteError:
    return IncompleteError(
        f"{num_failed} of {num_asked} requests have no answer yet: {first.message}",
        hint="repeat the command: what was answered is kept",
    )
