"""A run that is told to stop ends soon, also while it waits for judges and servers that do not answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from nemotron4.training.engine import TrainingEngine

Found = TypeVar("Found")


class StepStoppedError(Exception):
    """What the run waits for no longer, to be caught by the trainer: the step counts as not begun."""


class StopSwitch:
    """Whether the run was told to stop. What waits has ``grace_s`` more, so that the step may still end."""

    def __init__(self, grace_s: float = 5.0) -> None:
        self._grace_s = grace_s
        self._deadline: float | None = None
        self._waiting: set[asyncio.Task[Any]] = set()

    def set(self) -> None:
        """May be called by a signal's handler, and from any thread."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._grace_s
        for task in tuple(self._waiting):
            with contextlib.suppress(RuntimeError):  # its loop has just ended
                task.get_loop().call_soon_threadsafe(self._end_in_time, task)

    def is_set(self) -> bool:
        return self._deadline is not None

    def _end_in_time(self, task: asyncio.Task[Any]) -> None:
        assert self._deadline is not None, "the switch is set"
        task.get_loop().call_later(max(0.0, self._deadline - time.monotonic()), task.cancel)

    async def wait(self, work: Coroutine[Any, Any, Found]) -> Found:
        """What the work gives; StepStoppedError where it had to be cancelled."""
        task = asyncio.ensure_future(work)
        self._waiting.add(task)
        try:
            if self.is_set():
                self._end_in_time(task)
            await asyncio.wait((task,))
        finally:
            self._waiting.discard(task)
            is_stopped = task.cancelled()
            task.cancel()  # where Ctrl-C has cancelled the wait itself
        if is_stopped:
            raise StepStoppedError
        return task.result()


def joined_unless_stopped(engine: TrainingEngine, share: Callable[[], list[Found]]) -> list[Found]:
    """Everybody's results in the order of the jobs; StepStoppedError on all processes where one has it."""
    found: list[Found] = []
    is_stopped = False
    try:
        found = share()
    except StepStoppedError:
        is_stopped = True
    if engine.any_process(is_stopped):
        raise StepStoppedError
    return engine.joined(found)
