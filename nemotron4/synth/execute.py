"""Running a recipe, or one shard of it, into a folder by this process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

from nemotron4.client import ChatModel
from nemotron4.errors import ConfigError
from nemotron4.synth.ledger import Ledger
from nemotron4.synth.prepare import prepare
from nemotron4.synth.progress import Progress, Report, of_runner
from nemotron4.synth.project import LEDGER, save_recipe
from nemotron4.synth.recipe import Recipe
from nemotron4.synth.runner import Outcome, Runner


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    models: Mapping[str, ChatModel] | None = None,
    shard: tuple[int, int] = (0, 1),
    stage_limit: int | None = None,
    report: Report | None = None,
) -> Outcome:
    """Start or continue the run in ``folder``. SIGINT and SIGTERM end it cleanly; a second one at once."""
    prepared = prepare(recipe, models)
    save_recipe(folder, recipe)
    progress = None if report is None else Progress(report)
    ledger = Ledger(folder / LEDGER, synchronous="FULL" if recipe.durable == "power_loss" else "NORMAL")
    try:
        runner = Runner(
            recipe,
            prepared.stages,
            ledger,
            prepared.models,
            prepared.prompts,
            shard=shard,
            stage_limit=stage_limit,
            progress=None if progress is None else lambda runner: progress(of_runner(runner)),
        )

        async def main() -> Outcome:
            _stop_on_signals(runner)
            try:
                return await runner.run()
            finally:
                await prepared.close()

        with _rare_garbage_sweeps():
            return asyncio.run(main())
    finally:
        ledger.close()


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
        runner.stop(f"{number.name} was received")
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
