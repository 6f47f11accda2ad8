"""How many calls per second the engine completes against the fake server: its own cost, no model.

    python benchmarks/synth/overhead.py --calls 20000

The fake server runs in a process of its own, so client, engine, ledger and server share the machine.
``ideal`` is what the latency alone allows: calls in flight divided by the latency.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemotron4 import config
from nemotron4.synth.execute import run_recipe
from nemotron4.synth.recipe import Recipe

QUESTION = (
    "Please explain in your own words how subject number {i} works and where people meet it in daily life."
)


@dataclasses.dataclass(frozen=True)
class Setting:
    latency_ms: float
    in_flight: int

    @property
    def ideal(self) -> float | None:
        return None if not self.latency_ms else self.in_flight / (self.latency_ms / 1000)


SETTINGS = (Setting(0, 64), Setting(0, 256), Setting(20, 32), Setting(20, 256), Setting(200, 256))


def measure(setting: Setting, calls: int, durable: str) -> dict[str, object]:
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
            run_recipe(recipe, folder / "run", stage_limit=0)  # the roots, so that only calls are timed
            before = resource.getrusage(resource.RUSAGE_SELF)
            started = time.perf_counter()
            outcome = run_recipe(recipe, folder / "run")
            seconds = time.perf_counter() - started
            after = resource.getrusage(resource.RUSAGE_SELF)
    finally:
        server.terminate()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
    assert outcome.calls == calls
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rate = calls / seconds
    return {
        "latency_ms": setting.latency_ms,
        "in_flight": setting.in_flight,
        "calls": calls,
        "calls_per_s": round(rate),
        "share_of_ideal": None if setting.ideal is None else round(rate / setting.ideal, 3),
        "cpu_us_per_call": round(used / calls * 1e6),
        "max_rss_mb": round(after.ru_maxrss / 1024),
    }


def make_recipe(url: str, in_flight: int, prompts: Path, durable: str) -> Recipe:
    stages = [
        {"name": "in", "kind": "prompt_file", "knobs": {"file": str(prompts), "task": "bench"}},
        {"name": "answers", "kind": "respond", "takes": ["in"], "knobs": {"k": 1}},
    ]
    endpoint = {"gen": {"url": url, "max_in_flight": in_flight}}
    return config.build(
        Recipe, {"name": "overhead", "stage": stages, "endpoint": endpoint, "durable": durable}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--only", type=int, help="one of the settings, by its place from 0")
    parser.add_argument("--durable", choices=("power_loss", "kill"), default="power_loss")
    arguments = parser.parse_args()
    for setting in SETTINGS if arguments.only is None else SETTINGS[arguments.only : arguments.only + 1]:
        print(json.dumps(measure(setting, arguments.calls, arguments.durable)), flush=True)


if __name__ == "__main__":
    main()
