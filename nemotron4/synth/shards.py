"""A run in several pieces: shards in local processes or on Ray, then one merged run.

Every shard is a run of its own, in a folder of its own, so whoever starts it again continues it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from nemotron4.errors import ConfigError, Nemotron4Error, import_optional
from nemotron4.progress import Progress
from nemotron4.synth.check import check
from nemotron4.synth.execute import Report, of_shards, run_recipe, show
from nemotron4.synth.merge import merge
from nemotron4.synth.recipe import SynthRecipe, load_saved_recipe, save_recipe
from nemotron4.synth.runner import RunOutcome

TELL_S = 5.0
MAX_RESTARTS = 10  # of one shard, after deaths of its process or machine


def run_on_ray(shards: Sequence[Path], *, tell: Callable[[], None]) -> list[str]:
    """Run every shard; those that failed, with reasons. RAY_ADDRESS names a cluster, else one starts here.

    ``tell`` is called every few seconds.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry without being asked
    ray = import_optional("ray", "the executor 'ray'")
    is_mine = not ray.is_initialized()
    if is_mine:
        is_cluster = "RAY_ADDRESS" in os.environ
        # On one machine the shards wait for an endpoint most of the time, so each gets a slot of its own.
        ray.init(include_dashboard=False, **({} if is_cluster else {"num_cpus": len(shards)}))
    try:
        task = ray.remote(num_cpus=1, max_retries=MAX_RESTARTS)(_run_shard)
        here = os.getcwd()
        tasks = [task.remote(here, str(shard), i, len(shards)) for i, shard in enumerate(shards)]
        pending = tasks
        while pending:
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=TELL_S)
            if pending:
                tell()
        failed = []
        for shard, result in zip(shards, tasks, strict=True):
            try:
                reason = ray.get(result)
            except ray.exceptions.RayError as error:
                reason = str(error)
            if reason is not None:
                failed.append(f"{shard} ({reason})")
        return failed
    finally:
        if is_mine:
            ray.shutdown()


def _run_shard(folder: str, shard: str, index: int, num_shards: int) -> str | None:
    """The message of an error that another try would meet again; paths count from ``folder``."""

    os.chdir(folder)
    try:
        run_shard(Path(shard), index, num_shards)
    except Nemotron4Error as error:
        return error.message
    return None


def run_shards(
    recipe: SynthRecipe,
    folder: Path,
    num_shards: int,
    *,
    executor: Literal["local", "ray"] = "local",
    progress: Progress | None = None,
) -> RunOutcome:
    """Run all shards, merge them into ``folder``, then finish there what only the whole can decide.

    Raises ConfigError where shards make no sense, Nemotron4Error naming those that did not finish.
    """
    if num_shards < 1:
        raise ConfigError(f"workers is {num_shards}; expected 1 or more")
    if any(endpoint.form == "local" for endpoint in recipe.endpoint.values()):
        raise ConfigError(
            "each worker would load the model of a 'local' endpoint",
            hint="put it on a port with `nemotron4 serve` and name the address",
        )
    pipeline = check(recipe)
    shards = [folder / "shards" / f"{index:04d}-of-{num_shards:04d}" for index in range(num_shards)]
    for index, shard in enumerate(shards):
        save_recipe(shard, recipe, (index, num_shards))

    def tell() -> None:
        if progress is not None:
            show(progress, of_shards(shards, recipe))

    failed = run_on_ray(shards, tell=tell) if executor == "ray" else _run_in_processes(shards, tell=tell)
    if failed:
        raise Nemotron4Error(
            f"{len(failed)} of {num_shards} shards did not finish: {', '.join(failed)}",
            hint="repeat the same command (with a larger budget, if theirs is spent): it goes on there",
        )
    if progress is not None:
        progress.note(f"{num_shards} shards are done; merging")
    merge(shards, folder, pipeline)
    return run_recipe(recipe, folder, progress=progress)


def run_shard(shard: Path, index: int, num_shards: int, notice: Report = lambda line: None) -> None:
    """One shard in this process; its recipe is in its folder."""
    outcome = run_recipe(load_saved_recipe(shard), shard, shard=(index, num_shards), notice=notice)
    if outcome.ending != "finished":
        raise Nemotron4Error(f"{shard}: {outcome.reason}")


def _run_in_processes(shards: Sequence[Path], *, tell: Callable[[], None]) -> list[str]:
    """One process per shard, which prints its own error; the folders of those that failed."""
    command = [sys.executable, "-m", "nemotron4.synth.shards"]
    workers = [
        subprocess.Popen([*command, str(shard), str(index), str(len(shards))])
        for index, shard in enumerate(shards)
    ]
    told_at = time.monotonic()

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    earlier = signal.signal(signal.SIGTERM, end)
    try:
        while any(worker.poll() is None for worker in workers):
            time.sleep(0.05)
            if time.monotonic() - told_at > TELL_S:
                tell()
                told_at = time.monotonic()
    except BaseException:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, earlier)
    return [str(shard) for worker, shard in zip(workers, shards, strict=True) if worker.returncode != 0]


def _main(arguments: Sequence[str]) -> int:
    shard, index, num_shards = arguments

    def tell(line: str) -> None:
        if not line.startswith("note:"):  # the run as a whole says those
            print(f"shard {index}: {line}", file=sys.stderr)

    try:
        run_shard(Path(shard), int(index), int(num_shards), tell)
    except Nemotron4Error as error:
        print(f"error: shard {index}: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
