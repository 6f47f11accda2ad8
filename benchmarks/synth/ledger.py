"""A run with a million paid replies: its size on disk, memory as it grows, and the time of what reads it.

    python benchmarks/synth/ledger.py --replies 1000000 --out runs/million   # some six minutes of one core
    python benchmarks/synth/ledger.py --out runs/million --read              # times status and a restart

The run is a real one: engine, ledger and accounting, with a model in this process that answers at once with
some 350 tokens of English, taken from Python's own help texts. A record in the ledger holds both texts again.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

from nemotron4.client import FakeBehaviour, FakeChatModel, Sampling
from nemotron4.records import Message
from nemotron4.synth.execute import run_recipe
from nemotron4.synth.recipe import LEDGER, load_recipe

WORDS_PER_REPLY = 260
SPARE = 1000  # prompts beyond the budget, for the restart
RECIPE = """\
name = "million"
durable = "kill"
budget = {{ calls = {replies} }}

[endpoint.gen]
form = "fake"
max_in_flight = 256

[[stage]]
name = "in"
kind = "prompt_file"
knobs = {{ file = "{prompts}", task = "bench" }}

[[stage]]
name = "answers"
kind = "respond"
takes = ["in"]
knobs = {{ k = 1 }}
"""


def reply(messages: Sequence[Message], sampling: Sampling, words: Sequence[str] = ()) -> str:
    start = random.Random(sampling.seed).randrange(len(words) - WORDS_PER_REPLY)
    return " ".join(words[start : start + WORDS_PER_REPLY])


def make(folder: Path, replies: int) -> dict[str, object]:
    """Run until ``replies`` are paid; the memory is noted every five seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, recipe = folder / "prompts.jsonl", folder / "million.toml"
    with prompts.open("w", encoding="utf-8") as stream:
        for i in range(replies + SPARE):
            stream.write(json.dumps({"prompt": f"Please explain how subject number {i} works."}) + "\n")
    recipe.write_text(RECIPE.format(replies=replies, prompts=prompts), "utf-8")
    words = " ".join(topics.values()).split()
    model = FakeChatModel(FakeBehaviour(script=lambda m, s: reply(m, s, words)))
    memory: list[tuple[int, int]] = []
    processor_s = time.process_time()
    outcome = run_recipe(
        load_recipe(recipe),
        folder,
        models={"gen": model},
        report=lambda line: memory.append((model.calls, _resident_mb())),
    )
    assert outcome.reason.startswith("the budget"), outcome
    return {
        "replies": outcome.calls,
        "processor_us_per_call": round((time.process_time() - processor_s) / outcome.calls * 1e6),
        "memory_mb_at_calls": dict(memory[:: max(1, len(memory) // 10)]),
        **_size(folder / LEDGER),
    }


def _resident_mb() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20


def _size(path: Path) -> dict[str, object]:
    with sqlite3.connect(path) as db:
        rows = {
            table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("call", "record", "work")
        }
    size = sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))
    return {"rows": rows, "ledger_gb": round(size / 1e9, 3)}


def read(folder: Path) -> dict[str, object]:
    """Whole commands, the start of Python included: status, and a restart that makes 100 more calls."""
    recipe = folder / "million.toml"
    with sqlite3.connect(folder / LEDGER) as db:
        paid = db.execute("SELECT sum(value) FROM tally WHERE name = 'calls'").fetchone()[0]
    budget = f"budget.calls={int(paid) + 100}"
    commands = {
        "status_s": ["status", str(folder), "--json"],
        "status_again_s": ["status", str(folder), "--json"],
        "restart_s": ["run", str(recipe), "--out", str(folder), "--set", budget, "--json"],
    }
    figures: dict[str, object] = {}
    for name, command in commands.items():
        started, used_s = time.perf_counter(), _children_s()
        done = subprocess.run(
            [sys.executable, "-m", "nemotron4", "synth", *command], stdout=subprocess.PIPE, check=True
        )
        figures[name] = round(time.perf_counter() - started, 2)
        figures[name.replace("_s", "_processor_s")] = round(_children_s() - used_s, 2)
        answer = json.loads(done.stdout)
        assert (answer.get("accounting") or answer)["balanced"]
    return figures


def _children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replies", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run; it stays")
    parser.add_argument("--read", action="store_true", help="time what reads an existing run")
    arguments = parser.parse_args()
    folder = arguments.out
    print(json.dumps(read(folder) if arguments.read else make(folder, arguments.replies)))


if __name__ == "__main__":
    main()
