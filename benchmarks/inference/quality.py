#!/usr/bin/env python3
"""What a precision costs: KL divergence to float32, and change of perplexity with its standard error.

    benchmarks/inference/quality.py MODEL FILE... [--tokens 512] [--precisions stored int8 int4 bfloat16]
        [--kv-cache-dtype int8]

Each file is a text; its first tokens are scored. float32 has its own cache whatever the others have.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from nemotron4.checkpoint import open_checkpoint
from nemotron4.inference.native.library import BLOCK, Form
from nemotron4.inference.native.model import NativeCache, read_model
from nemotron4.inference.precision import CACHES, FLOATS, QUANTISED
from nemotron4.inference.runner import NativeRunner
from nemotron4.inference.scheduler import Sequence, Slice

KINDS = {"stored": None, **QUANTISED, **FLOATS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument(
        "--precisions", nargs="+", choices=KINDS, default=["stored", "int8", "int4", "bfloat16"]
    )
    parser.add_argument("--kv-cache-dtype", choices=("bfloat16", "int8"), default="bfloat16")
    options = parser.parse_args()
    cache = CACHES[options.kv_cache_dtype]
    checkpoint = open_checkpoint(options.model)
    tokenizer = checkpoint.tokenizer()
    rows = [list(tokenizer.encode(path.read_text()))[: options.tokens] for path in options.files]
    runners = {name: runner(checkpoint, name, cache, options.tokens) for name in options.precisions}
    runners["float32"] = runner(checkpoint, "float32", Form.F32, options.tokens)
    divergences: dict[str, list[float]] = {name: [] for name in options.precisions}
    losses: dict[str, list[float]] = {name: [] for name in options.precisions}
    for row in rows:
        exact = logprobs(runners["float32"], row)
        own = np.arange(len(row) - 1), np.array(row[1:])
        for name in options.precisions:
            found = logprobs(runners[name], row)
            divergences[name].append(float((np.exp(exact) * (exact - found)).sum(1).mean()))
            losses[name].append(float((exact[own] - found[own]).mean()))
    for name in options.precisions:
        error = np.std(losses[name]) / math.sqrt(len(rows))
        change = math.expm1(float(np.mean(losses[name])))
        print(f"{name}: KL {np.mean(divergences[name]):.5f}, perplexity {change:+.2%} (+-{error:.2%})")


def runner(checkpoint: Any, name: str, kept: Form, num_tokens: int) -> NativeRunner:
    cache = NativeCache(checkpoint.config, -(-num_tokens // BLOCK), kept)
    return NativeRunner(read_model(checkpoint, KINDS[name], cache, num_threads=2))


def logprobs(runner: NativeRunner, row: list[int]) -> Any:
    """Of every token at every position but the last."""
    sequence = Sequence(tuple(row), max_shared=0, blocks=list(range(-(-len(row) // BLOCK))))
    hidden_ND = runner.run([Slice(sequence, 0, len(row))]).hidden_ND
    logits = runner.logits(hidden_ND, 0, len(row) - 1).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


if __name__ == "__main__":
    main()
