"""Shards as tasks of Ray, on this machine or on a cluster that runs already.

Ray starts a task again whose process or machine died; the task then finds its ledger and goes on. On a
cluster of several machines the run's folder must be one that all of them see, where SQLite can lock files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from nemotron4.errors import ConfigError
from nemotron4.synth.runner import PROGRESS_S

MAX_RESTARTS = 10  # of one shard, after deaths of its process or machine


def run_on_ray(shards: Sequence[Path], *, tell: Callable[[], None]) -> list[str]:
    """Run every shard; those that failed, with reasons. RAY_ADDRESS names a cluster, else one starts here.

    ``tell`` is called every few seconds.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry without being asked
    try:
        import ray
    except ImportError as error:
        raise ConfigError("the executor 'ray' needs Ray", hint="pip install 'nemotron4[ray]'") from error
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
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=PROGRESS_S)
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
    from nemotron4.errors import Nemotron4Error
    from nemotron4.synth.shards import run_shard

    os.chdir(folder)
    try:
        run_shard(Path(shard), index, num_shards)
    except Nemotron4Error as error:
        return error.message
    return None
