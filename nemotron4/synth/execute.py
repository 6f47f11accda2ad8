"""Running a recipe, or one shard of it, into a folder by this process, and telling how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemotron4.client import ChatModel
from nemotron4.errors import ConfigError
from nemotron4.progress import Progress
from nemotron4.runs import IncompleteError
from nemotron4.synth.accounting import Accounting, read_accounting
from nemotron4.synth.check import prepare
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import LEDGER, RECIPE, SynthRecipe, load_saved_shard, save_recipe
from nemotron4.synth.runner import Runner, RunOutcome
from nemotron4.synth.writer import Ledger

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


def of_shards(shards: Sequence[Path], recipe: SynthRecipe) -> Snapshot:
    """All shards together, as their ledgers are."""
    total = Snapshot(0, 0, 0.0, 0, {stage.name: 0 for stage in recipe.stage})
    for shard in shards:
        if not (shard / LEDGER).exists():
            continue
        with Reader(shard / LEDGER) as ledger:
            accounting = read_accounting(ledger, recipe)
        total.calls += int(accounting.total("calls"))
        total.tokens += int(accounting.total("prompt_tokens") + accounting.total("completion_tokens"))
        total.money += accounting.total("money")
        total.failed += accounting.num_failed
        for stage in accounting.stages:
            total.done[stage.name] += stage.done
    return total


def show(progress: Progress, now: Snapshot) -> None:
    """Tell a snapshot as progress: rows that are done, what they cost, and which endpoint has trouble."""
    under_way = "" if now.in_flight is None else f" ({now.in_flight} under way)"
    money = f", {now.money:.4f} in money" if now.money else ""
    done = ", ".join(f"{name} {number}" for name, number in now.done.items() if number)
    progress.more = {key: value for key, value in vars(now).items() if key not in ("done", "failed")}
    progress.more["stages"] = now.done
    progress.num_tokens = now.tokens
    progress.add(
        max(0, sum(now.done.values()) - progress.num_done),
        num_failed=max(0, now.failed - progress.num_failed),
        detail=f"{now.calls} calls{under_way}{money}; {done or 'nothing is done yet'}",
    )
    for trouble in now.troubles:
        progress.repeated(trouble)


def run_recipe(
    recipe: SynthRecipe,
    folder: Path,
    *,
    models: Mapping[str, ChatModel] | None = None,
    shard: tuple[int, int] = (0, 1),
    stage_limit: int | None = None,
    progress: Progress | None = None,
    notice: Report | None = None,
) -> RunOutcome:
    """Start or continue the run in ``folder``. SIGINT and SIGTERM end it cleanly; a second one at once.

    ``progress`` is told how far it is, ``notice`` (or ``progress``) what a user should know at once. Raises
    IncompleteError when work is pending without being stopped, and when all of a stage failed.
    """
    pipeline, made = prepare(recipe, models)
    notice = notice or (progress.note if progress is not None else lambda line: None)
    for note in pipeline.notes:
        notice(f"note: {note}")
    ledger = Ledger(folder / LEDGER, synchronous="FULL" if recipe.durable == "power_loss" else "NORMAL")
    try:
        earlier = load_saved_shard(folder) if (folder / RECIPE).exists() else None
        if earlier is not None and earlier != shard:
            raise ConfigError(
                f"{folder} is shard {earlier[0]}/{earlier[1]} of its run; given {shard[0]}/{shard[1]}",
                hint="repeat its own command, or give every shard a folder of its own",
            )
        save_recipe(folder, recipe, shard)
        runner = Runner(
            pipeline,
            ledger,
            made,
            shard=shard,
            stage_limit=stage_limit,
            progress=None if progress is None else lambda runner: show(progress, of_runner(runner)),
            notice=notice,
        )

        async def main() -> RunOutcome:
            _stop_on_signals(runner)
            try:
                return await runner.run()
            finally:
                for model in made.values():
                    await model.close()

        with _rare_garbage_sweeps():
            outcome = asyncio.run(main())
        if outcome.ending == "finished" and stage_limit is None:
            _check_not_all_failed(read_accounting(ledger, recipe))
        return outcome
    finally:
        ledger.close()


def _check_not_all_failed(accounting: Accounting) -> None:
    for stage in accounting.stages:
        num_failed = sum(stage.failed.values())
        if num_failed and num_failed == stage.requested:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(stage.failed.items()))
            raise IncompleteError(
                f"stage {stage.name!r}: all of its {num_failed} pieces of work failed: {reasons}",
                hint="`synth status DIR --failures 10` shows the reasons, `synth retry DIR` tries again",
            )


@contextlib.contextmanager
def _rare_garbage_sweeps() -> Iterator[None]:
    """A run makes thousands of small objects per second, few in cycles: a tenth of its time was sweeps.

    What is imported by now stays, so it is left out of them.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _stop_on_signals(runner: Runner) -> None:
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        runner.stop(f"{number.name} was received", signal_number=number)
        loop.remove_signal_handler(number)  # the next one ends the process the usual way

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, stop, number)
        except (ValueError, RuntimeError):  # not the main thread: the owner of that thread decides
            return


def parse_shard(text: str) -> tuple[int, int]:
    """``2/8`` is the third of eight shards."""
    index, separator, number = text.partition("/")
    if not separator or not index.isdigit() or not number.isdigit() or not 0 <= int(index) < int(number):
        raise ConfigError(f"shard is {text!r}; expected INDEX/NUMBER with 0 <= INDEX < NUMBER, as in 0/8")
    return int(index), int(number)
