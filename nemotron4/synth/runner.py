"""The engine: pulls the deepest ready work, keeps every endpoint as busy as it allows, stores replies.

A kill at any moment loses nothing that was stored: the same command goes on where the ledger is.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import orjson

from nemotron4.client import BadContentError, ChatModel, ClientError, HopelessError
from nemotron4.runs import IncompleteError
from nemotron4.synth.endpoint import EndpointDownError, ModelEndpoint, StoppedError
from nemotron4.synth.files import digests
from nemotron4.synth.graph import Pipeline, PreparedStage
from nemotron4.synth.merge import reconcile_graph, run_barrier
from nemotron4.synth.rows import Root, Row, decode, digest, record_id, shard_of
from nemotron4.synth.stage import Filtered
from nemotron4.synth.tables import DONE, FAILED, FILTERED, Child, Effects, children_of, row_content
from nemotron4.synth.work import Postponed, Shared, Spending, Work
from nemotron4.synth.writer import GroupCommit, Ledger

QUEUE_LIMIT = 4096  # work held in memory per stage; the rest waits in the ledger
PAGE = 1024
PROGRESS_S = 1.0
MIN_JUDGED = 20  # pieces of work before the share of failures says something

Ending = Literal["finished", "stopped"]


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended. ``finished``: no work is left, or the target is reached. ``signal`` stopped it."""

    ending: Ending
    reason: str
    seconds: float
    calls: int
    signal: int | None = None
    is_target_missed: bool = False


@dataclass(frozen=True)
class _Item:
    """Ready work. ``row`` and ``content`` are at hand when a stage has just made them."""

    record: bytes
    attempt: int
    row: Row | None = None
    content: bytes = b""


@dataclass
class _Queue:
    """Ready work of one stage: some in memory, perhaps more in the ledger."""

    items: deque[_Item] = field(default_factory=deque)
    known: set[bytes] = field(default_factory=set)  # in memory or running
    has_more: bool = True
    cursor: bytes = b""


class Runner:
    """One process, one event loop, one ledger.

    shard: (index, number); only roots of this shard are worked on. stage_limit: at most so many records per
    stage (for previews).
    """

    def __init__(
        self,
        pipeline: Pipeline,
        ledger: Ledger,
        models: Mapping[str, ChatModel],
        *,
        shard: tuple[int, int] = (0, 1),
        stage_limit: int | None = None,
        progress: Callable[[Runner], None] | None = None,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.recipe = recipe = pipeline.recipe
        self.stages = stages = pipeline.stages
        self.ledger = ledger
        self._models = models
        self._prompts = pipeline.prompts
        self._shard = shard
        self._stage_limit = stage_limit
        self._progress = progress
        self._notice = notice
        self._signal: int | None = None
        self._missing: dict[str, int] = {}  # rows that are still to be made, of stages with a target
        self._is_target_reached = False
        self._num_postponed = 0
        self._last_postponed = ""
        self._queues = {stage.name: _Queue() for stage in stages}
        self._taken: dict[str, int] = {stage.name: 0 for stage in stages}
        self._running: set[asyncio.Task[None]] = set()
        self._something_ended = asyncio.Event()
        self._stop_reason: str | None = None
        self._error: BaseException | None = None
        self.endpoints: dict[str, ModelEndpoint] = {}
        self.counts: dict[tuple[str, str], int] = {}
        self.spending = Spending(recipe.budget, shard)

    async def run(self) -> RunOutcome:
        """Work until nothing is ready, the budget is reached or ``stop`` is called."""
        started_at = time.monotonic()
        self.spending = _spending_so_far(self.spending, self.ledger)
        calls_before = self.spending.calls
        self.endpoints = {
            name: ModelEndpoint(
                name, config, self._models[name], self.recipe.retry, self._notice, self._shard[1]
            )
            for name, config in self.recipe.endpoint.items()
            if name in self._models
        }
        self._prepare()
        async with GroupCommit(self.ledger) as commit:
            shared = Shared(
                ledger=self.ledger,
                commit=commit,
                endpoints=self.endpoints,
                prompts=self._prompts,
                retry=self.recipe.retry,
                spending=self.spending,
                seed=self.recipe.seed,
                has_old_replies=calls_before > 0,
                stop=self.stop,
            )
            made = self.ledger.record_counts()
            self._missing = {
                name: -(-number // self._shard[1]) - made.get(name, 0)
                for name, number in self.recipe.target.items()
            }
            self._check_target()
            reporter = asyncio.create_task(self._report_progress())
            try:
                await self._drive(shared)
            finally:
                reporter.cancel()
                if self._progress is not None:
                    self._progress(self)
                for own in shared.own_code.values():
                    await own.close()
        if self._error is not None:
            raise self._error
        return RunOutcome(
            ending="finished" if self._stop_reason is None or self._is_target_reached else "stopped",
            reason=self._stop_reason or self._missed_target() or "nothing is left to do",
            seconds=time.monotonic() - started_at,
            calls=self.spending.calls - calls_before,
            signal=self._signal,
            is_target_missed=self._stop_reason is None and self._missed_target() is not None,
        )

    def stop(
        self, reason: str, error: BaseException | None = None, *, signal_number: int | None = None
    ) -> None:
        """Start no new call; calls under way are waited for and stored. With an error, ``run`` raises it."""
        self._signal = self._signal or signal_number
        self._stop_reason = self._stop_reason or reason
        self._error = self._error or error
        for endpoint in self.endpoints.values():
            endpoint.stop(StoppedError())

    def _prepare(self) -> None:
        """Redo what the recipe changed, and make the roots of the source stages."""
        reconcile_graph(self.ledger, self.stages)
        for stage in self.stages:
            if stage.is_source:
                identity = roots_identity(stage, self._shard)
                self.ledger.set_roots(stage.name, identity, self._roots(stage))

    def _roots(self, stage: PreparedStage) -> Iterator[Child]:
        """The roots of a source stage that belong to this shard."""
        assert stage.kind.roots is not None
        name = f"root:{stage.name}"
        for index, entry in enumerate(stage.kind.roots(stage.knobs)):
            identity = record_id(name, None, index)
            if shard_of(identity, self._shard[1]) == self._shard[0]:
                yield Child(name, index, row_content(Root(index=index, entry=entry)), identity, None)

    async def _drive(self, shared: Shared) -> None:
        while self._stop_reason is None:
            self._something_ended.clear()
            self._start_work(shared)
            if self._running:
                await self._something_ended.wait()
            elif self._num_postponed:
                # A stage that sees all rows would decide without those that are still to come.
                number = self._num_postponed
                what = "piece of work is" if number == 1 else "pieces of work are"
                message = f"{number} {what} left pending after {self.recipe.retry.max_attempts} attempts each"
                hint = "repeat the same command; with retry.fail_transient = true they count as failed"
                error = IncompleteError(f"{message}; the last: {self._last_postponed}", hint=hint)
                self.stop(message, error)
            elif not await self._next_barrier(shared):
                break
        if self._running:
            await asyncio.wait(self._running)

    async def _report_progress(self) -> None:
        while self._progress is not None:
            await asyncio.sleep(PROGRESS_S)
            self._progress(self)

    def _start_work(self, shared: Shared) -> None:
        # A few more than the endpoints take, so that a freed slot never waits for this loop.
        room = sum(int(endpoint.limit.limit * 1.25) + 4 for endpoint in self.endpoints.values()) or 64
        while len(self._running) < room:
            following = self._next_item()
            if following is None:
                return
            stage, item = following
            task = asyncio.create_task(self._work_on(shared, stage, item))
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._something_ended.set()

    def _next_item(self) -> tuple[PreparedStage, _Item] | None:
        """The next piece of work of the deepest stage that has some and is not a barrier."""
        for stage in reversed(self.stages):
            if stage.is_barrier or self._is_at_limit(stage):
                continue
            queue = self._queues[stage.name]
            if not queue.items and queue.has_more:
                self._refill(stage.name, queue)
            if queue.items:
                self._taken[stage.name] += 1
                return stage, queue.items.popleft()
        return None

    def _is_at_limit(self, stage: PreparedStage) -> bool:
        return self._stage_limit is not None and self._taken[stage.name] >= self._stage_limit

    def _refill(self, name: str, queue: _Queue) -> None:
        """Read ready work from the ledger, once around the ids, skipping what is already running."""
        was_at_start = queue.cursor == b""
        while True:
            page = self.ledger.ready(name, queue.cursor, PAGE)
            for item in page:
                if item.record not in queue.known:
                    queue.items.append(_Item(item.record, item.attempt))
                    queue.known.add(item.record)
            queue.cursor = page[-1].record if len(page) == PAGE else b""
            if queue.items:
                return
            if queue.cursor == b"":
                if was_at_start:
                    queue.has_more = False
                    return
                was_at_start = True

    async def _work_on(self, shared: Shared, stage: PreparedStage, item: _Item) -> None:
        endpoint = stage.endpoints[0] if stage.endpoints else None
        work = Work(shared, stage.name, item.record, item.attempt, endpoint, stage.sampling)
        effects = Effects(stage=stage.name, record=item.record, cfg=stage.cfg, consumers=stage.consumers)
        made: Sequence[Row | None] = ()
        row, content = item.row, item.content
        try:
            if row is None:
                content = self.ledger.content(item.record)
                row = decode(orjson.loads(content))
            assert stage.kind.run is not None
            made = await stage.kind.run(row, work, stage.knobs)
            effects.state = DONE
            effects.children = children_of(stage.name, item.record, made)
            effects.parent_content, effects.sources = content, work.replies
        except Filtered as drop:
            effects.state, effects.failure_class, effects.reason = FILTERED, drop.rule, drop.message
        except StoppedError:
            return work.abandon()
        except Postponed as error:
            self._num_postponed += 1  # it stays among the known items, so nobody takes it up again
            self._last_postponed = str(error)
            return work.abandon()
        except EndpointDownError as error:
            work.abandon()
            return self.stop(error.message, error)
        except ClientError as error:
            effects.state, effects.failure_class = FAILED, f"{_error_class(error)}: {error.kind}"
            effects.reason = error.message
        except BaseException as error:
            work.abandon()
            return self.stop(f"stage {stage.name}: {error!r}", error)
        try:
            await work.finish(effects)
        except BaseException as error:
            return self.stop(str(error), error)
        assert row is not None
        rows = [row if child is None else child for child in made]
        self._finished(stage, item, effects, rows, [child.content or content for child in effects.children])
        return None

    def _finished(
        self,
        stage: PreparedStage,
        item: _Item,
        effects: Effects,
        rows: Sequence[Row],
        contents: Sequence[bytes],
    ) -> None:
        """The effects are durable: offer the children to their stages."""
        self._queues[stage.name].known.discard(item.record)
        outcome = {DONE: "done", FAILED: "failed", FILTERED: "filtered"}[effects.state]
        self.counts[stage.name, outcome] = self.counts.get((stage.name, outcome), 0) + 1
        if effects.state == FAILED:
            self._check_failure_share(stage, effects)
        if stage.name in self._missing:
            self._missing[stage.name] -= len(effects.children)
            self._check_target()
        for consumer in stage.consumers:
            queue = self._queues[consumer]
            for child, row, content in zip(effects.children, rows, contents, strict=True):
                if len(queue.items) >= QUEUE_LIMIT or queue.has_more:
                    queue.has_more = True
                else:
                    queue.items.append(_Item(child.id, 0, row, content))
                    queue.known.add(child.id)

    def _check_target(self) -> None:
        """Stop when every stage with a target has made its rows."""
        if self._missing and max(self._missing.values()) <= 0:
            wanted = ", ".join(f"{name} {number}" for name, number in self.recipe.target.items())
            self._is_target_reached = True
            self.stop(f"the target is reached: {wanted}")

    def _missed_target(self) -> str | None:
        """What is missing when there is nothing left to make it of."""
        missed = [
            f"{name} lacks {number} of {self.recipe.target[name]} rows"
            for name, number in self._missing.items()
            if number > 0
        ]
        return f"the target is not reached: {', '.join(missed)}; nothing is left to do" if missed else None

    def _check_failure_share(self, stage: PreparedStage, effects: Effects) -> None:
        failed = self.counts[stage.name, "failed"]
        total = sum(number for (name, _), number in self.counts.items() if name == stage.name)
        if total >= MIN_JUDGED and failed > self.recipe.retry.max_failure_share * total:
            message = f"stage {stage.name!r}: {failed} of {total} pieces of work failed"
            self.stop(
                message,
                IncompleteError(
                    f"{message}; the last: {effects.failure_class}: {effects.reason}",
                    hint="mend it, then `synth retry` tries the failed ones too; see retry.max_failure_share",
                ),
            )

    async def _next_barrier(self, shared: Shared) -> bool:
        """Run the first stage that waits for all rows above it; True if there was one."""
        for stage in self.stages:
            if stage.is_barrier and self.ledger.ready(stage.name, b"", 1):
                await asyncio.to_thread(run_barrier, self.ledger, stage)
                for consumer in stage.consumers:
                    self._queues[consumer].has_more = True
                return True
        return False


def roots_identity(stage: PreparedStage, shard: tuple[int, int]) -> str:
    """What the roots of a source stage are made from: its settings, the bytes of its files, the shard."""
    knobs = vars(stage.knobs).values()
    files = [found for value in knobs if isinstance(value, Path) for found in digests(value)]
    return digest("roots", stage.cfg.hex(), files, shard).hex()


def _error_class(error: ClientError) -> str:
    if isinstance(error, HopelessError):
        return "hopeless"
    return "content" if isinstance(error, BadContentError) else "transient"


def _spending_so_far(spending: Spending, ledger: Ledger) -> Spending:
    for (_, name), value in ledger.tallies().items():
        if name == "calls":
            spending.calls += int(value)
        elif name in ("prompt_tokens", "completion_tokens"):
            spending.tokens += int(value)
        elif name == "money":
            spending.money += value
    return spending
