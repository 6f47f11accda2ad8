"""Process start to first token, and peak memory, of a model in a fresh process each round.

    python benchmarks/startup.py [--model smollm2] [--rounds 5]

raw: ``nemotron4.load`` and the first step of a raw prompt. chat: the same for a message in the model's own
format. terminal: ``nemotron4 chat`` with the message on its stdin, up to the first letter it writes. The
clock starts before the process does. The median, the fastest and the slowest round are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

QUESTION = "What is the capital of France?"
FIRST_TOKEN = f"""
import asyncio, json, pathlib, sys, time
import nemotron4
from nemotron4.engine import SamplingParams

async def first(engine, ids):
    async for step in engine.stream(ids, SamplingParams(max_new_tokens=1, temperature=0)):
        return time.time()

engine = nemotron4.load(sys.argv[1])
question = {QUESTION!r}
prompt = [{{"role": "user", "content": question}}] if sys.argv[2] == "chat" else question
ids = engine.request(prompt, SamplingParams()).prompt_ids
at = asyncio.run(first(engine, ids))
peak = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
weights_mb = engine.info.num_parameters * {{"float32": 4}}.get(engine.info.dtype, 2) / 1e6
print(json.dumps({{"at": at, "peak_mb": int(peak.split()[1]) * 1024 / 1e6, "weights_mb": weights_mb}}))
engine.close()
"""


def measure(model: str, case: str) -> dict[str, float]:
    start = time.time()
    if case == "terminal":
        return {"seconds": _first_letter(model) - start}
    command = [sys.executable, "-c", FIRST_TOKEN, model, case]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {"seconds": result.pop("at") - start, **result}


def _first_letter(model: str) -> float:
    command = [sys.executable, "-m", "nemotron4", "chat", model, "--max-new-tokens", "8"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(QUESTION.encode() + b"\n")
        process.stdin.close()
        os.read(process.stdout.fileno(), 1)
        return time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cases = ("raw", "chat", "terminal")
    measure(arguments.model, "raw")  # puts the files into the page cache
    rounds = [{case: measure(arguments.model, case) for case in cases} for _ in range(arguments.rounds)]
    for case in cases:
        seconds = sorted(results[case]["seconds"] for results in rounds)
        row = {
            "case": case,
            "median_s": round(statistics.median(seconds), 2),
            "range_s": [round(seconds[0], 2), round(seconds[-1], 2)],
            **{
                name: round(max(results[case][name] for results in rounds))
                for name in ("peak_mb", "weights_mb")
                if name in rounds[0][case]
            },
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
