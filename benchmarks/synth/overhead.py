"""How many calls per second the engine completes against the fake server: its own cost, no model.

    python benchmarks/synth/overhead.py --calls 10000 --rounds 3

The fake server runs in a process of its own, so client, engine, ledger and server share the machine. Every
round runs all settings one after the other; printed are medians over the rounds.

``latency_rate`` is what the latency alone allows: calls in flight divided by the latency. No engine beats its
own rate at 0 ms, so ``ideal`` is the smaller of the two, with the same number of calls in flight.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemotron4 import config
from nemotron4.synth.execute import run_recipe
from nemotron4.synth.recipe import SynthRecipe
from nemotron4.synth.shards import run_shards

QUESTION = (
    "Please explain in your own words how subject number {i} works and where people meet it in daily life."
)


@dataclasses.dataclass(frozen=True)
class Setting:
    latency_ms: float
    in_flight: int
    workers: int = 1

    @property
    def latency_rate(self) -> float:
        in_flight = self.in_flight * self.workers
        return float("inf") if not self.latency_ms else in_flight / (self.latency_ms / 1000)


SETTINGS = (Setting(0, 32), Setting(20, 32), Setting(0, 256), Setting(20, 256), Setting(200, 256))
WORKERS = (Setting(20, 256), Setting(20, 128, workers=2))  # whole runs, as many calls in flight in all


@dataclasses.dataclass(frozen=True)
class Measured:
    calls_per_s: float
    client_us: float  # processor time of a call in this process and its workers
    server_us: float  # and in the fake server
    max_rss_mb: float


def measure(setting: Setting, calls: int, *, durable: str, is_whole: bool) -> Measured:
    """``is_whole``: the time from nothing to the end of the run; else only that of the calls."""
    command = [sys.executable, "-m", "nemotron4.client.fake_server", "--latency-ms", str(setting.latency_ms)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prompts = folder / "prompts.jsonl"
            rows = (json.dumps({"prompt": QUESTION.format(i=i)}) + "\n" for i in range(calls))
            prompts.write_text("".join(rows), "utf-8")
            recipe = make_recipe(url, setting.in_flight, prompts, durable)
            if not is_whole:
                run_recipe(recipe, folder / "run", stage_limit=0)
            used, server_used = _used_s(), _server_s(server.pid)
            started = time.perf_counter()
            if setting.workers == 1:
                outcome = run_recipe(recipe, folder / "run")
                assert outcome.calls == calls
            else:
                run_shards(recipe, folder / "run", setting.workers, report=lambda line: None)
            seconds = time.perf_counter() - started
            used, server_used = _used_s() - used, _server_s(server.pid) - server_used
    finally:
        server.terminate()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
    return Measured(
        calls_per_s=calls / seconds,
        client_us=used / calls * 1e6,
        server_us=server_used / calls * 1e6,
        max_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def _used_s() -> float:
    """Processor seconds of this process and of the children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _server_s(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def make_recipe(url: str, in_flight: int, prompts: Path, durable: str) -> SynthRecipe:
    stages = [
        {"name": "in", "kind": "prompt_file", "knobs": {"file": str(prompts), "task": "bench"}},
        {"name": "answers", "kind": "respond", "takes": ["in"], "knobs": {"k": 1}},
    ]
    endpoint = {"gen": {"url": url, "max_in_flight": in_flight}}
    return config.build(
        SynthRecipe, {"name": "overhead", "stage": stages, "endpoint": endpoint, "durable": durable}
    )


def summary(setting: Setting, rounds: list[dict[Setting, Measured]]) -> dict[str, object]:
    measured = [figures[setting] for figures in rounds]
    ideal = [
        min(setting.latency_rate, figures[at_0].calls_per_s)
        for figures in rounds
        for at_0 in (dataclasses.replace(setting, latency_ms=0),)
        if setting.latency_ms and at_0 in figures
    ]
    shares = [m.calls_per_s / rate for m, rate in zip(measured, ideal, strict=False)]
    return {
        **dataclasses.asdict(setting),
        "calls_per_s": [round(m.calls_per_s) for m in measured],
        "median_calls_per_s": round(statistics.median(m.calls_per_s for m in measured)),
        "latency_rate": round(setting.latency_rate) if setting.latency_ms else None,
        "ideal": round(statistics.median(ideal)) if ideal else None,
        "share_of_ideal": round(statistics.median(shares), 3) if shares else None,
        "client_us_per_call": round(statistics.median(m.client_us for m in measured)),
        "server_us_per_call": round(statistics.median(m.server_us for m in measured)),
        "max_rss_mb": round(max(m.max_rss_mb for m in measured)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--workers", action="store_true", help="one process beside two, nothing else")
    parser.add_argument("--durable", choices=("power_loss", "kill"), default="power_loss")
    arguments = parser.parse_args()
    settings = WORKERS if arguments.workers else SETTINGS
    rounds = [
        {
            setting: measure(setting, arguments.calls, durable=arguments.durable, is_whole=arguments.workers)
            for setting in settings
        }
        for _ in range(arguments.rounds)
    ]
    for setting in settings:
        print(json.dumps(summary(setting, rounds)), flush=True)


if __name__ == "__main__":
    main()
