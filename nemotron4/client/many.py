"""Many calls, each answer on disk when it is there: what a kill interrupts goes on where it stopped."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from nemotron4.client.interface import BadContentError, HopelessError, TransientError
from nemotron4.records import JsonObject
from nemotron4.runs import IncompleteError, RowLog, in_flight

ERROR = "error"  # a row with this field says why there is no answer: {"kind": ..., "message": ...}


async def ask_missing(
    log: RowLog,
    ids: Sequence[str],
    ask: Callable[[str], Awaitable[JsonObject]],
    *,
    concurrency: int,
    on_rows: Callable[[Sequence[JsonObject]], None],
) -> dict[str, JsonObject]:
    """Rows by id: those of the log, and a new one for each id that has none.

    ``ask`` gives the fields of a row and retries by itself. A call that can never succeed, or whose answer is
    unusable, leaves a row with ``error``; one that may succeed later leaves none and, when all others are
    done, IncompleteError is raised. ``on_rows`` is called in a thread with rows that are on the disk.
    """
    failures: list[TransientError] = []

    async def work(name: str) -> JsonObject | None:
        try:
            return {"id": name, **await ask(name)}
        except TransientError as error:
            failures.append(error)
            return None
        except (HopelessError, BadContentError) as error:
            return {"id": name, ERROR: {"kind": error.kind, "message": error.message}}

    def keep(rows: list[JsonObject | None]) -> None:
        finished = [row for row in rows if row is not None]
        log.append(*finished)
        on_rows(finished)

    await in_flight((name for name in ids if name not in log), work, keep, limit=concurrency)
    if failures:
        raise IncompleteError(
            f"{len(failures)} of {len(ids)} requests have no answer yet: {failures[0].message}",
            hint="repeat the command: what was answered is kept",
        )
    return {name: log[name] for name in ids}
