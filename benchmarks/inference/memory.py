"""Memory of a process that runs 128 sequences, next to its bound.

    python benchmarks/inference/memory.py MODEL [--quantize int8] [--rounds 3] [--sequences 128] [--new 16]

Each round has new prompts of 128 tokens. The bound is 1.25 times the bytes of weights and of the keys and
values in use at once, and 250 MB. kept: of ended requests, for prompts that begin like theirs. other: what is
left: interpreter, libraries (mapped_mb: of files), vocabulary, activations, logits.
"""

from __future__ import annotations

import argparse
import json
import random
import threading

from cells import memory_bytes

import nemotron4
from nemotron4.inference.engine import Engine
from nemotron4.inference.runner import NativeRunner

PROMPT = 128
POLL_S = 0.002


class Watch(threading.Thread):
    """The most blocks that were in use, and that were touched: in use or kept."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._pool = engine._scheduler.pool
        self._is_over = threading.Event()
        self.num_used = self.num_touched = 0

    def run(self) -> None:
        while not self._is_over.wait(POLL_S):
            self.num_used = max(self.num_used, self._pool.num_used)
            self.num_touched = self._pool._num_touched

    def end(self) -> None:
        self._is_over.set()
        self.join()


def resident_mb(name: str) -> float:
    return memory_bytes(name) / 1e6


def weights_mb(engine: Engine) -> float:
    assert isinstance(engine._runner, NativeRunner), "the built-in engine on a CPU"
    model = engine._runner.model
    arrays = [model.weights[name].num_bytes for name in model.weights]
    embedding = 0 if model.embedding is None else model.embedding.nbytes
    return (sum(arrays) + embedding) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--new", type=int, default=16, help="tokens of a sequence")
    options = parser.parse_args()
    draw = random.Random(0)
    with nemotron4.load(options.model, adapter=None, quantize=options.quantize) as engine:
        weights, cache = weights_mb(engine), engine._runner.cache
        block_mb = (cache.keys.nbytes + cache.values.nbytes) / cache.num_blocks / 1e6
        print(
            json.dumps({"loaded_mb": round(resident_mb("VmRSS")), "weights_mb": round(weights)}), flush=True
        )
        for number in range(options.rounds):
            vocabulary = range(300, engine.info.vocab_size)
            prompts = [draw.choices(vocabulary, k=PROMPT) for _ in range(options.sequences)]
            watch = Watch(engine)
            watch.start()
            engine.generate(prompts, max_new_tokens=options.new, temperature=0, ignore_eos=True)
            watch.end()
            peak, used = resident_mb("VmHWM"), watch.num_used * block_mb
            touched = watch.num_touched * block_mb
            row = {
                "most_resident_mb": peak,
                "bound_mb": 1.25 * (weights + used) + 250,
                "in_use_mb": used,
                "kept_mb": touched - used,
                "mapped_mb": resident_mb("RssFile"),
                "other_mb": peak - weights - touched,
            }
            print(json.dumps({"round": number + 1, **{k: round(v) for k, v in row.items()}}), flush=True)


if __name__ == "__main__":
    main()
