"""Tokens/s while another program keeps one processor busy, as a share of the quiet ones.

    .venv/bin/python benchmarks/inference/starved.py MODEL [--precision int8] [--rounds 3] [--seconds 2]
                                                     [--rows 1 32]

The other program is a loop in a process of its own: free to move, or pinned to the first or last processor.
The cases take turns; each figure is the median of its rounds. A round in which third programs took more than
5 % of a processor is repeated, up to five times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nemotron4

LOOP = """
import os, sys
if sys.argv[1] != "free":
    os.sched_setaffinity(0, {int(sys.argv[1])})
while True:
    pass
"""
MOST_OTHERS = 0.05
TRIES = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "int8", "int4"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one figure, about")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32])
    options = parser.parse_args()
    is_quantized = options.precision in ("int8", "int4")
    dtype = "auto" if is_quantized or options.precision is None else options.precision
    quantize = options.precision if is_quantized else None
    processors = sorted(os.sched_getaffinity(0))
    cases = ["quiet", "free", str(processors[0]), str(processors[-1])]
    with nemotron4.load(options.model, dtype=dtype, quantize=quantize) as engine:

        def generate(num_rows: int, num_new: int) -> float:
            prompts = [[300 + row, *range(400, 431)] for row in range(num_rows)]
            began = time.perf_counter()
            engine.generate(prompts, max_new_tokens=num_new, temperature=0, ignore_eos=True)
            return num_rows * num_new / (time.perf_counter() - began)

        for num_rows in options.rows:
            generate(num_rows, 8)
            num_new = max(16, min(1024, int(options.seconds * generate(num_rows, 32) / num_rows)))
            found: dict[str, list[float]] = {case: [] for case in cases}
            for _ in range(options.rounds):
                for case in cases:
                    found[case].append(speed_beside(case, lambda: generate(num_rows, num_new)))  # noqa: B023
            quiet = statistics.median(found["quiet"])
            shares = {case: statistics.median(found[case]) / quiet for case in cases[1:]}
            words = ", ".join(f"{case} {100 * share:.0f} %" for case, share in shares.items())
            every = "; ".join(" ".join(f"{speed:.4g}" for speed in found[case]) for case in cases)
            print(f"{num_rows} rows: quiet {quiet:.4g} tokens/s; of it {words} ({every})", flush=True)


def speed_beside(case: str, measure: Callable[[], float]) -> float:
    for _ in range(TRIES):
        loop = None if case == "quiet" else subprocess.Popen([sys.executable, "-c", LOOP, case])
        time.sleep(0.1)
        began, before = time.perf_counter(), processor_seconds(loop)
        speed = measure()
        others = (processor_seconds(loop) - before) / (time.perf_counter() - began)
        if loop is not None:
            loop.kill()
            loop.wait()
        if others < MOST_OTHERS:
            return speed
    print(f"{case}: third programs took {100 * others:.0f} % of a processor", file=sys.stderr)
    return speed


def processor_seconds(loop: subprocess.Popen[bytes] | None) -> float:
    """Of everything but this process and the loop."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    ticks = user + nice + system + irq + softirq
    if loop is not None:
        fields = Path(f"/proc/{loop.pid}/stat").read_text().rpartition(")")[2].split()
        ticks -= int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


if __name__ == "__main__":
    main()
