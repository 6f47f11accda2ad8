"""Many calls, each answer on disk when it is there: what a kill interrupts goes on where it stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from nemotron4.client.interface import BadContentError, HopelessError, TransientError
from nemotron4.errors import Nemotron4Error
from nemotron4.records import JsonObject
from nemotron4.run_folder import RowLog

ERROR = "error"  # a row with this field says why there is no answer: {"kind": ..., "message": ...}


class IncompleteError(Nemotron4Error):
    """Some calls failed in a way that may pass; the same command goes on where this one stopped."""


async def ask_missing(
    log: RowLog,
    ids: Sequence[str],
    ask: Callable[[str], Awaitable[JsonObject]],
    *,
    concurrency: int,
    on_row: Callable[[JsonObject], None],
) -> dict[str, JsonObject]:
    """Rows by id: those of the log, and a new one for each id that has none.

    ``ask`` gives the fields of a row and retries by itself. A call that can never succeed, or whose answer is
    unusable, leaves a row with ``error``; one that may succeed later leaves none and, when all others are
    done, IncompleteError is raised.
    """
    rows: dict[str, JsonObject] = {row["id"]: row for row in log.rows}
    waiting = iter([name for name in ids if name not in rows])
    failures: list[TransientError] = []

    async def work() -> None:
        for name in waiting:
            try:
                row = {"id": name, **await ask(name)}
            except TransientError as error:
                failures.append(error)
                continue
            except (HopelessError, BadContentError) as error:
                row = {"id": name, ERROR: {"kind": error.kind, "message": error.message}}
            log.append(row)
            rows[name] = row
            on_row(row)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(work())
    if failures:
        raise IncompleteError(
            f"{len(failures)} of {len(ids)} requests have no answer yet: {failures[0].message}",
            hint="repeat the command: what was answered is kept",
        )
    return {name: rows[name] for name in ids}
