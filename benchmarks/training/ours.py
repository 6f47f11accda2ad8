"""Our side of compare.py: ours.py CASE MODEL FOLDER STEPS BATCH DTYPE"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nemotron4.training import run
from nemotron4.training.metrics import StepRecord
from nemotron4.training.recipe import build

STAGES = {"fixed": "pretrain", "sft": "sft", "dpo": "preference"}


def main(case: str, model: str, folder: Path, steps: int, batch: int, dtype: str) -> None:
    torch.set_num_threads(2)
    for cache in folder.glob(".reference-*"):  # a round pays for its reference pass
        cache.unlink()
    values: dict[str, Any] = {
        "stage": STAGES[case],
        "model": {"start": str(folder / "model"), "compute": dtype},
        "data": {"train": [str(folder / f"{case}.jsonl")], "max_length": 512 if case == "fixed" else 1024},
        "optimizer": {"learning_rate": 1e-5},
        "batch": {"global_size": batch, "row_tokens": 2048},
        "run": {"directory": str(folder / "ours"), "max_steps": steps, "save_every": 10**6},
    }
    if case == "dpo":
        values["preference"] = {"loss": "dpo", "beta": 0.1}
    shutil.rmtree(folder / "ours", ignore_errors=True)
    seen: list[StepRecord] = []
    moments: list[float] = []

    def on_progress(progress: StepRecord) -> None:
        seen.append(progress)
        moments.append(time.perf_counter())

    started: list[float] = []

    def note(text: str) -> None:
        if text.startswith("reference"):
            started.append(time.perf_counter())

    run.train(build(values), note=note, on_progress=on_progress)
    first = started[0] if started else moments[0] - seen[0].values["seconds"]
    num_tokens = sum(progress.values["tokens"] for progress in seen)
    print(
        json.dumps(
            {
                "tokens_per_s": num_tokens / (moments[-1] - first),
                "memory_gb": seen[-1].values["memory_gb"],
                "mfu": statistics.median(progress.values["mfu"] for progress in seen),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
