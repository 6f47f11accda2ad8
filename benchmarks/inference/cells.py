"""What a peer measures: the same prompts, the same clock. A peer gives ``generate(prompts, num_new)``."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

Prompts = list[list[int]]
NEW = 128
SHARED, SAMPLES = 1000, 4  # of the cell ``shared``: tokens that all 64 prompts begin with, samples of each


def prompts(count: int, length: int, vocabulary: int) -> Prompts:
    return [[random.Random(seed).randrange(300, vocabulary) for _ in range(length)] for seed in range(count)]


def shape(cell: str) -> tuple[int, int]:
    """Number and length of the cell's prompts, at least."""
    if cell == "tokens":
        return 4, 128
    if cell == "shared":
        return 64 * SAMPLES, SHARED + 16
    return int(cell) if cell.isdigit() else 1, {"prefill": 1024, "long": 4096 - NEW}.get(cell, 128)


def since_start() -> float:
    """Seconds since this process began."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def run(cell: str, vocabulary: int, version: str, generate: Callable[[Prompts, int], Prompts]) -> None:
    """Print the cell's figure. ``generate`` gives so many new tokens of each prompt, greedily."""
    if cell == "start":
        generate(prompts(1, 16, vocabulary), 1)
        answer(version, since_start())
        return
    if cell == "tokens":
        print(json.dumps({"tokens": generate(prompts(4, 64, vocabulary), 32)}))
        return
    generate(prompts(1, 20, vocabulary), 2)  # what happens once is not measured
    asked = prompts(*shape(cell), vocabulary)
    began = time.perf_counter()
    if cell == "prefill":
        generate(asked, 1)
        answer(version, len(asked[0]) / (time.perf_counter() - began))
    elif cell == "shared":
        asked = [asked[0][:SHARED] + asked[i // SAMPLES][SHARED:] for i in range(len(asked))]
        num_new = sum(map(len, generate(asked, NEW // 2)))
        answer(version, num_new / (time.perf_counter() - began))
    elif cell in ("one", "long"):
        generate([asked[0][7:] + asked[0][:7]], 1)  # memory that is used for the first time takes longer
        began = time.perf_counter()
        generate(asked, 1)
        first = time.perf_counter() - began
        other = [asked[0][::-1]]  # nothing of it is in a cache
        began = time.perf_counter()
        num_new = len(generate(other, NEW)[0])
        seconds = time.perf_counter() - began - first
        if seconds <= 0:
            sys.exit("the prompt's time changed by more than the answer takes: something else is running")
        answer(version, (num_new - 1) / seconds)
    else:
        num_new = sum(map(len, generate(asked, NEW)))
        answer(version, num_new / (time.perf_counter() - began))


def answer(version: str, value: float) -> None:
    print(json.dumps({"value": value, "version": version, "memory_mb": peak_bytes(os.getpid()) / 1e6}))
    sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.terminate()
        child.join(20)
    os._exit(0)  # how long a peer takes to end is not its figure


def memory_bytes(field: str, pid: int | str = "self") -> int:
    """A field of /proc/PID/status; 0 of a process that has ended, which has none."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_bytes(pid: int) -> int:
    """The most memory that a process had at once, and each one below it."""
    own = memory_bytes("VmHWM", pid)
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return own + sum(peak_bytes(int(child)) for t in tasks for child in (t / "children").read_text().split())
