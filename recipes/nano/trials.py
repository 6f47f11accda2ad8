"""The card's choices and a scaling law at nano size: python recipes/nano/trials.py DATA OUT [NAME...]

DATA is what the recipe's stage `data` made. Each training is one line of OUT/trials.jsonl, and those that
are there are not repeated: the same command adds what is missing. NAMEs (or beginnings of names) choose
some of them.

The protocol, written before the runs. Every training has 200 steps of 1,024 tokens, half from books, half
from definitions, AdamW at 3e-3 sqrt(192 / hidden size), a tenth of warm-up, cosine to a tenth, products in
bfloat16. Measured after the last step: bits per byte of 18 held-out chapters and 1,000 definitions together.
- Choices: 0.79 million parameters with the card's block, and with one thing changed: SwiGLU with as many
  parameters, whole heads rotated, RMSNorm. Seeds 0, 1, 2 for weights and order of the data; the difference
  is taken seed by seed.
- Law: five sizes at these tokens, and at the compute (6 N D) of the third, seed 0. N counts what is
  multiplied: all but the input embedding. L = E + A / N^a + B / D^b is fitted to both by least squares; a
  sixth size is held out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prepare import rows_of

from nemotron4.checkpoint import open_checkpoint
from nemotron4.model.config import ModelConfig
from nemotron4.model.presets import PRESETS, nano
from nemotron4.runs import read_rows
from nemotron4.training import recipe as recipes
from nemotron4.training.metrics import METRICS_FILE
from nemotron4.training.run import train

STEPS, WINDOWS, WINDOW = 200, 2, 512
HELD_OUT = {"books_held_out": 18, "definitions_held_out": 1000}  # the first documents of each


def shape(hidden_size: int, num_layers: int, num_kv_heads: int = 1, **changed: Any) -> ModelConfig:
    sizes = {"hidden_size": hidden_size, "ffn_hidden_size": 4 * hidden_size, "num_heads": hidden_size // 32}
    return dataclasses.replace(nano(), num_layers=num_layers, num_kv_heads=num_kv_heads, **(sizes | changed))


CHOICES = {
    "card": shape(96, 4),
    "SwiGLU": shape(96, 4, mlp="swiglu", ffn_hidden_size=256),
    "full rotary": shape(96, 4, rotary_fraction=1.0),
    "RMSNorm": shape(96, 4, norm="rmsnorm"),
}
SIZES = [shape(64, 2), shape(96, 4), shape(128, 5), shape(192, 6, 2), shape(320, 8, 2)]
UNSEEN = shape(160, 5)


def multiplied(config: ModelConfig) -> int:
    """Parameters but the input embedding."""
    return config.num_parameters - config.vocab_size * config.hidden_size


def trials() -> dict[str, tuple[ModelConfig, int, int]]:
    """Name -> shape, steps, seed; cheap ones first."""
    found = {
        f"choice {name} {seed}": (config, STEPS, seed)
        for seed in range(3)
        for name, config in CHOICES.items()
    }
    reference = multiplied(SIZES[2])
    for config in [*SIZES[:4], UNSEEN, SIZES[4]]:
        found[f"tokens {config.num_parameters}"] = config, STEPS, 0
    for config in SIZES:
        found[f"compute {config.num_parameters}"] = config, round(STEPS * reference / multiplied(config)), 0
    return found


def run(data: Path, config: ModelConfig, steps: int, seed: int) -> dict[str, Any]:
    PRESETS["trial"] = lambda: config
    rate = 3e-3 * math.sqrt(192 / config.hidden_size)
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train_on = [{"path": str(data / name), "weight": 0.5} for name in ("books", "definitions")]
        held_out = [{"path": str(data / f"{name}.jsonl"), "limit": limit} for name, limit in HELD_OUT.items()]
        values = {
            "stage": "pretrain",
            "model": {"preset": "trial", "tokenizer": str(data / "start"), "compute": "bfloat16"},
            "data": {"train": train_on, "validation": held_out, "max_length": WINDOW},
            "optimizer": {"learning_rate": rate, "min_learning_rate": rate / 10, "schedule": "cosine",
                          "warmup_steps": max(1, steps // 10), "betas": [0.9, 0.95], "weight_decay": 0.1},
            "batch": {"global_size": WINDOWS, "row_tokens": WINDOWS * WINDOW},
            "run": {"directory": folder, "max_steps": steps, "seed": seed},
        }  # fmt: skip
        train(recipes.build(values))
        loss = [row for row in read_rows(Path(folder) / METRICS_FILE) if row["kind"] == "validation"][-1][
            "loss"
        ]
    return {"loss": loss, "seconds": round(time.process_time() - started, 1)}


def nats_to_bits_per_byte(data: Path) -> float:
    """What a loss in nats a token is multiplied by; an end of a document is a token and counts as a byte."""
    tokenizer = open_checkpoint(data / "start").tokenizer()
    texts = [row["text"] for name, limit in HELD_OUT.items() for row in rows_of(data, name)[:limit]]
    tokens = sum(len(tokenizer.encode(text, parse_special=False)) + 1 for text in texts)
    return tokens / sum(len(text.encode()) + 1 for text in texts) / math.log(2)


def main(data: Path, out: Path, chosen: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file = out / "trials.jsonl"
    done = {row["name"] for row in read_rows(file)} if file.exists() else set()
    factor = nats_to_bits_per_byte(data)
    for name, (config, steps, seed) in trials().items():
        if name in done or (chosen and not name.startswith(tuple(chosen))):
            continue
        found = run(data, config, steps, seed)
        sizes = {"parameters": config.num_parameters, "multiplied": multiplied(config)}
        spent = {"steps": steps, "tokens": steps * WINDOWS * WINDOW, "seed": seed}
        row = {"name": name, **sizes, **spent, "bits": found["loss"] * factor, **found}
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
