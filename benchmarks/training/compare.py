"""Our trainer beside transformers' Trainer and TRL's SFT and DPO trainers: the same weights and rows.

    python -m venv trl && trl/bin/pip install torch trl          # the peers, in an environment of their own
    python benchmarks/training/compare.py --peer-python trl/bin/python [--models nano small] [--rounds 3]

Float32 (bfloat16 on both sides with --dtype), AdamW (fused), 2 threads, batches of 8 (small: 4). Rows
of `sft` and `dpo` have the lengths of real chats (log-normal, prompts around 60, answers around 150 tokens,
at most 1,024 together); `fixed` are windows of 512. A trainer's time runs from its first step, or from its
reference pass, to its last step; tokens are those of the rows, without padding. Ours and theirs take turns,
each in a process of its own; a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NUM_STEPS = {"nano": 6, "small": 4}
BATCH = {"nano": 8, "small": 4}
CASES = ("fixed", "sft", "dpo")
LONGEST = 1024


def words(generator: random.Random, median: float, longest: int) -> str:
    """Text of a random length; with the benchmark's tokenizer one letter is one token."""
    length = min(longest, max(4, round(math.exp(generator.gauss(math.log(median), 0.9)))))
    return "".join(generator.choices(string.ascii_lowercase, k=length))


def write_rows(folder: Path, num: int) -> None:
    generator = random.Random(0)
    sft, dpo = [], []
    for _ in range(num):
        prompt = words(generator, 60, 400)
        chosen, rejected = (words(generator, 150, LONGEST - len(prompt) - 8) for _ in range(2))
        sft.append({"prompt": prompt, "completion": chosen})
        dpo.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    text = [{"text": "".join(generator.choices(string.ascii_lowercase, k=513 * num))}]
    for name, rows in (("sft", sft), ("dpo", dpo), ("fixed", text)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(python: str, script: str, *arguments: str) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--models", nargs="+", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of each run (nano: 6, small: 4)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, help="samples of each step (nano: 8, small: 4)")
    options = parser.parse_args()
    print(
        "| model | case | ours, tokens/s | theirs, tokens/s | ratio (rounds) | memory, ours / theirs | MFU |"
    )
    print("|---|---|---|---|---|---|---|")
    for model in options.models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            steps, batch = options.steps or NUM_STEPS[model], options.batch or BATCH[model]
            write_rows(folder, steps * batch)
            measure(options.peer_python, "peer.py", "make", model, name, "0", "0", "")
            for case in options.cases:
                arguments = (case, model, name, str(steps), str(batch), options.dtype)
                rounds = [
                    (
                        measure(sys.executable, "ours.py", *arguments),
                        measure(options.peer_python, "peer.py", *arguments),
                    )
                    for _ in range(options.rounds)
                ]
                ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in rounds]
                ours, theirs = (
                    {key: statistics.median(entry[side][key] for entry in rounds) for key in rounds[0][side]}
                    for side in (0, 1)
                )
                print(
                    f"| {model} | {case} | {ours['tokens_per_s']:,.0f} | {theirs['tokens_per_s']:,.0f} "
                    f"| **{statistics.median(ratios):.2f}** ({', '.join(f'{r:.2f}' for r in ratios)}) "
                    f"| {ours['memory_gb']:.2f} / {theirs['memory_gb']:.2f} GB "
                    f"({ours['memory_gb'] / theirs['memory_gb']:.2f}) | {ours['mfu']:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
