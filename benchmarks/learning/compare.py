"""Held-out bits per byte of a trained model and of a 5-gram model on the same tokens, in one table.

python benchmarks/learning/compare.py DATA MODEL: DATA as prepare.py wrote it, MODEL a run's model folder.
The 5-gram model reads the training documents of books.jsonl and definitions.jsonl; both models then predict
every token of the held-out documents. The trained model reads windows of its training length that do not
overlap, so it starts each window without context; the 5-gram model never does.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
from ngram import KneserNey

import nemotron4
from nemotron4.checkpoint import open_checkpoint

WINDOW = 512
PARTS = ("books", "definitions")


def documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def main(data: Path, model: Path) -> None:
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    separator = tokenizer.bos_id
    assert separator is not None

    def stream(name: str) -> tuple[list[int], int]:
        """All documents with the separator between them, and their bytes (a separator counts as one)."""
        ids, num_bytes = [separator], 0
        for text in documents(data / f"{name}.jsonl"):
            ids += [*tokenizer.encode(text, parse_special=False), separator]
            num_bytes += len(text.encode()) + 1
        return ids, num_bytes

    training = [token for part in PARTS for token in stream(part)[0]]
    grams = KneserNey(training, vocab_size=checkpoint.config.vocab_size)
    print(f"{len(training):,} training tokens")
    print(f"{'held out':<14}{'tokens':>10}{'bytes':>10}{'5-gram':>10}{'model':>10}   bits per byte")
    with nemotron4.load(str(model), dtype="float32") as engine:
        for part in PARTS:
            ids, num_bytes = stream(f"{part}_held_out")
            theirs = -float(np.log2(grams.probabilities(ids)).sum()) / num_bytes
            windows = [ids[i : i + WINDOW + 1] for i in range(0, len(ids) - 1, WINDOW)]
            ours = -sum(map(sum, engine.score(token_ids=windows))) / math.log(2) / num_bytes
            print(f"{part:<14}{len(ids) - 1:>10,}{num_bytes:>10,}{theirs:>10.4f}{ours:>10.4f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
