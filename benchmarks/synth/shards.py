"""A run in many shards with failures, merged, against the same run in one process.

    python benchmarks/synth/shards.py --shards 1000 --prompts 20000 --out runs/shards

Each shard is stopped once or twice at a random number of calls (as a kill or a lost node would) and started
again; a tenth of the calls fails and is repeated. The model answers in the process. At the end every exported
file of the merged run is compared with that of one process, byte by byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import time
from pathlib import Path

from nemotron4 import config
from nemotron4.client import FakeBehaviour, FakeChatModel
from nemotron4.synth.check import check
from nemotron4.synth.execute import run_recipe
from nemotron4.synth.export import export
from nemotron4.synth.merge import merge
from nemotron4.synth.recipe import Budget, SynthRecipe

FAILURES = {"rate_limit": 0.05, "server_error": 0.05}


def recipe_of(prompts: Path) -> SynthRecipe:
    stages = [
        {"name": "in", "kind": "prompt_file", "knobs": {"file": str(prompts), "task": "t"}},
        {"name": "near", "kind": "near_dedup", "takes": ["in"]},
        {"name": "answer", "kind": "respond", "takes": ["near"], "max_tokens": 24},
        {"name": "judge", "kind": "judge_llm", "takes": ["answer"]},
    ]
    values = {
        "name": "shards", "stage": stages, "endpoint": {"gen": {"form": "fake"}}, "durable": "kill",
        "retry": {"first_wait_s": 0.001, "max_wait_s": 0.01},
        "export": {"preference": ["judge"], "prompts": ["near"]},
    }  # fmt: skip
    return config.build(SynthRecipe, values)


def write_prompts(path: Path, number: int) -> None:
    """Every twentieth is a near-duplicate of an earlier one, mostly of another shard."""
    draw = random.Random(1)
    starts, ends = ("ri", "ba", "lo", "me", "tu", "sa"), ("ver", "ker", "tus", "dow", "lip")
    words = [f"{start}{end}" for start in starts for end in ends]
    texts: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        for i in range(number):
            is_copy = i % 20 == 19
            text = (
                f"{draw.choice(texts)} please" if is_copy else " ".join(draw.choices(words, k=12)) + f" w{i}"
            )
            texts = [*texts[-500:], text]
            file.write(json.dumps({"prompt": text}) + "\n")


def run_shard(recipe: SynthRecipe, folder: Path, index: int, number: int) -> int:
    """Starts of the shard until it was finished."""
    draw = random.Random(index)
    starts = 0
    for stop in (*sorted(draw.choices(range(1, 40), k=draw.randint(1, 2))), 0):
        starts += 1
        # A budget for the whole run is divided among its shards.
        limited = dataclasses.replace(recipe, budget=Budget(calls=stop * number))
        model = FakeChatModel(FakeBehaviour(failure_rates=FAILURES, seed=draw.randrange(1 << 30)))
        outcome = run_recipe(limited, folder, models={"gen": model}, shard=(index, number))
        if outcome.ending == "finished":
            break
    # The recipe that the folder keeps is the one of the whole run.
    run_recipe(recipe, folder, models={"gen": FakeChatModel()}, shard=(index, number))
    return starts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=20000)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    write_prompts(given.out / "prompts.jsonl", given.prompts)
    recipe = recipe_of(given.out / "prompts.jsonl")
    started = time.monotonic()
    run_recipe(recipe, given.out / "one", models={"gen": FakeChatModel()})
    one_s = time.monotonic() - started
    started = time.monotonic()
    shards = [given.out / "shards" / f"{i:04d}" for i in range(given.shards)]
    starts = sum(run_shard(recipe, shard, i, given.shards) for i, shard in enumerate(shards))
    shards_s = time.monotonic() - started
    started = time.monotonic()
    merge(shards, given.out / "merged", check(recipe))
    merge_s = time.monotonic() - started
    run_recipe(recipe, given.out / "merged", models={"gen": FakeChatModel()})
    files = [export(given.out / name, recipe).folder for name in ("one", "merged")]
    same = [
        (files[0] / name).read_bytes() == (files[1] / name).read_bytes()
        for name in ("preference.jsonl", "prompts.jsonl", "accounting.json")
    ]
    rows = len((files[0] / "preference.jsonl").read_text("utf-8").splitlines())
    result = {
        "shards": given.shards, "prompts": given.prompts, "starts": starts, "pairs": rows,
        "one_process_s": round(one_s, 1), "shards_s": round(shards_s, 1), "merge_s": round(merge_s, 1),
        "ledger_bytes": (given.out / "merged/ledger.sqlite").stat().st_size,
        "files_are_equal": all(same),
    }  # fmt: skip
    print(json.dumps(result))
    if not all(same):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
