"""Group commit: one thread writes whatever has gathered while the last commit reached the disk.

The batch grows with the load by itself: an idle run commits at once, a busy one hundreds of rows at a time.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from typing import Self

from nemotron4.synth.effects import Effects
from nemotron4.synth.ledger import Ledger

MAX_BATCH = 512


class GroupCommit:
    """``await commit.store(effects)`` returns when they are durable. The first failure is final."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._queue: queue.SimpleQueue[tuple[Effects, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._error: BaseException | None = None

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._queue.put(None)
        while self._thread.is_alive():
            await asyncio.sleep(0.001)

    def store(self, effects: Effects) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((effects, future))
        return future

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch = [self._queue.get()]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            entries = [entry for entry in batch if entry is not None]
            is_open = len(entries) == len(batch)
            if not entries:
                continue
            try:
                if self._error is not None:
                    raise self._error
                self._ledger.apply([effects for effects, _ in entries])
            except BaseException as error:  # handed to every waiting task, which raises it
                self._error = error
            self._loop.call_soon_threadsafe(_settle, [future for _, future in entries], self._error)


def _settle(futures: list[asyncio.Future[None]], error: BaseException | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
