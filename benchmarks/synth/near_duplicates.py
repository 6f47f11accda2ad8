"""Near-duplicate removal: time and memory for a million prompts, and beside libraries on a smaller set.

python benchmarks/synth/near_duplicates.py --prompts 1000000
python benchmarks/synth/near_duplicates.py --prompts 20000 --peers
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Callable
from pydoc_data.topics import topics

from nemotron4.synth.duplicates import SHINGLE_BYTES, find_near_duplicates
from nemotron4.synth.parsing import normalise

THRESHOLD = 0.75


def make_prompts(number: int) -> list[str]:
    """Runs of 10 to 30 words of English; every tenth repeats an earlier one with one word changed."""
    words = " ".join(topics.values()).split()
    draw = random.Random(2)
    prompts: list[str] = []
    for i in range(number):
        if i % 10 == 9:
            copy = prompts[draw.randrange(len(prompts))].split()
            copy[draw.randrange(len(copy))] = draw.choice(words)
            prompts.append(" ".join(copy))
        else:
            prompts.append(" ".join(draw.choices(words, k=draw.randint(10, 30))))
    return prompts


def with_datasketch(prompts: list[str]) -> int:
    """The same question with datasketch: 100 permutations, its LSH index, no exact check."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=100)
    dropped = 0
    for i, prompt in enumerate(prompts):
        text = normalise(prompt).encode()
        sketch = MinHash(num_perm=100)
        sketch.update_batch(
            [text[j : j + SHINGLE_BYTES] for j in range(max(1, len(text) - SHINGLE_BYTES + 1))]
        )
        if index.query(sketch):
            dropped += 1
        else:
            index.insert(str(i), sketch)
    return dropped


def with_rensa(prompts: list[str]) -> int:
    """The same with rensa (Rust)."""
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=THRESHOLD, num_perm=100, num_bands=20)
    dropped = 0
    for i, prompt in enumerate(prompts):
        text = normalise(prompt)
        sketch = RMinHash(num_perm=100, seed=1)
        sketch.update([text[j : j + SHINGLE_BYTES] for j in range(max(1, len(text) - SHINGLE_BYTES + 1))])
        if index.query(sketch):
            dropped += 1
        else:
            index.insert(i, sketch)
    return dropped


def report(name: str, prompts: list[str], function: Callable[[list[str]], int]) -> None:
    started = time.perf_counter()
    dropped = function(prompts)
    seconds = time.perf_counter() - started
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"what": name, "prompts": len(prompts), "dropped": dropped, "seconds": round(seconds, 1)}
    print(json.dumps({**result, "max_rss_mb": round(rss)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--peers", action="store_true", help="also datasketch and rensa, where installed")
    arguments = parser.parse_args()
    prompts = make_prompts(arguments.prompts)
    report("nemotron4", prompts, lambda texts: len(find_near_duplicates(texts, THRESHOLD)))
    for name, function in (("datasketch", with_datasketch), ("rensa", with_rensa)):
        if arguments.peers:
            try:
                report(name, prompts, function)
            except ImportError:
                print(json.dumps({"what": name, "missing": True}), flush=True)


if __name__ == "__main__":
    main()
