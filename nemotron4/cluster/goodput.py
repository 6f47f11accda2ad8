"""What failures cost a long run: how often to write a checkpoint, and how much of the time trains.

A run works, writes a checkpoint every so often, and on a failure starts again from the last one. Failures
come at random (exponentially) and more often on more GPUs. Goodput is the share of the time that trains.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# GPU-hours between failures that end the job, as published.
GPU_HOURS_BETWEEN_FAILURES: Mapping[str, float] = MappingProxyType(
    {
        # Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days on 16,384 H100.
        "llama-3": 16_384 * 54 * 24 / 419,
        # Kokolis et al. (arXiv 2410.21680): 6.50 failures in 1,000 days of a node of 8 A100, cluster RSC-1.
        "rsc-1": 8 * 24 * 1000 / 6.50,
    }
)
NUM_RUNS = 200


@dataclass(frozen=True, kw_only=True)
class Failures:
    """``write_s``: training waits for a checkpoint; ``restart_s``: from a failure to the next step."""

    gpu_hours_between: float
    write_s: float
    restart_s: float

    def mean_time_s(self, num_gpus: int) -> float:
        return 3600 * self.gpu_hours_between / num_gpus


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Over simulated runs: the share of the time that trains, and its middle 90 %."""

    interval_s: float
    mean: float
    low: float
    high: float
    failures: float  # of a run, on average


def best_interval_s(failures: Failures, num_gpus: int) -> float:
    """Daly's first order: sqrt(2 * write * MTBF) - write (Future Generation Computer Systems 22, 2006)."""
    mean_s = failures.mean_time_s(num_gpus)
    return max(failures.write_s, math.sqrt(2 * failures.write_s * mean_s) - failures.write_s)


def simulate(
    failures: Failures, num_gpus: int, work_s: float, *, interval_s: float | None = None, seed: int = 0
) -> Goodput:
    """Many runs of ``work_s`` seconds of training, with a checkpoint every ``interval_s`` of it."""
    step_s = min(work_s, interval_s or best_interval_s(failures, num_gpus))
    draw = random.Random(seed)
    shares, num_failures = [], 0
    for _ in range(NUM_RUNS):
        elapsed_s, failed = _one_run(draw, failures, failures.mean_time_s(num_gpus), work_s, step_s)
        shares.append(work_s / elapsed_s)
        num_failures += failed
    shares.sort()
    return Goodput(
        interval_s=step_s, mean=sum(shares) / NUM_RUNS, low=shares[NUM_RUNS // 20],
        high=shares[-NUM_RUNS // 20], failures=num_failures / NUM_RUNS,
    )  # fmt: skip


def _one_run(
    draw: random.Random, failures: Failures, mean_s: float, work_s: float, step_s: float
) -> tuple[float, int]:
    """Seconds until the work is done, and how many failures there were."""
    elapsed_s = done_s = 0.0
    num_failed = 0
    until_failure_s = draw.expovariate(1 / mean_s)
    while done_s < work_s:
        stretch_s = min(step_s, work_s - done_s)
        needed_s = stretch_s + failures.write_s
        if until_failure_s >= needed_s:  # whole stretches up to the failure at once: runs have many thousands
            num = max(1, min(int(until_failure_s / needed_s), int((work_s - done_s) / stretch_s)))
            elapsed_s += num * needed_s
            until_failure_s -= num * needed_s
            done_s += num * stretch_s
        else:
            num_failed += 1
            elapsed_s += until_failure_s + failures.restart_s
            until_failure_s = draw.expovariate(1 / mean_s)
    return elapsed_s, num_failed
