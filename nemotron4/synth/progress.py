"""What a run under way tells: what was spent, how fast, what each stage has done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemotron4.synth.books import read_books
from nemotron4.synth.ledger import Reader
from nemotron4.synth.project import LEDGER
from nemotron4.synth.recipe import Recipe
from nemotron4.synth.runner import Runner

Report = Callable[[str], None]


@dataclass
class Snapshot:
    """The state of a run at one moment. ``troubles`` are endpoints whose calls are being repeated."""

    calls: int
    tokens: int
    money: float
    failed: int
    done: dict[str, int]
    in_flight: int | None = None
    troubles: list[str] = field(default_factory=list)


def of_runner(runner: Runner) -> Snapshot:
    """Calls, tokens and money over all starts of the run; what is done and failed since this one."""
    spending = runner.spending
    return Snapshot(
        calls=spending.calls,
        tokens=spending.tokens,
        money=spending.money,
        failed=sum(number for (_, outcome), number in runner.counts.items() if outcome == "failed"),
        done={stage.name: runner.counts.get((stage.name, "done"), 0) for stage in runner.stages},
        in_flight=spending.in_flight,
        troubles=[
            f"endpoint {name!r} has trouble, calls are repeated: {endpoint.trouble}"
            for name, endpoint in runner.endpoints.items()
            if endpoint.trouble is not None
        ],
    )


def of_shards(shards: Sequence[Path], recipe: Recipe) -> Snapshot:
    """All shards together, as their ledgers stand."""
    total = Snapshot(0, 0, 0.0, 0, {stage.name: 0 for stage in recipe.stage})
    for shard in shards:
        if not (shard / LEDGER).exists():
            continue
        with Reader(shard / LEDGER) as ledger:
            books = read_books(ledger, recipe)
        total.calls += int(books.total("calls"))
        total.tokens += int(books.total("prompt_tokens") + books.total("completion_tokens"))
        total.money += books.total("money")
        total.failed += books.num_failed
        for stage in books.stages:
            total.done[stage.name] += stage.done
    return total


class Progress:
    """Writes one line for each snapshot, with the rates since the one before."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._last: tuple[float, int, int] | None = None

    def __call__(self, now: Snapshot) -> None:
        stamp = (time.monotonic(), now.calls, now.tokens)
        rates = ""
        if self._last is not None:
            seconds, calls, tokens = (new - old for new, old in zip(stamp, self._last, strict=True))
            rates = f", {calls / seconds:.1f} calls/s and {tokens / seconds:.0f} tokens/s"
        self._last = stamp
        under_way = "" if now.in_flight is None else f" ({now.in_flight} under way)"
        money = f", {now.money:.4f} in money" if now.money else ""
        done = ", ".join(f"{name} {number}" for name, number in now.done.items() if number)
        self._report(
            f"{now.calls} calls{under_way}, {now.tokens} tokens{money}{rates}, {now.failed} failed; "
            f"done: {done or 'nothing yet'}"
        )
        for trouble in now.troubles:
            self._report(trouble)
