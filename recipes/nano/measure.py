"""Held-out bits per byte of a trained model and of a 5-gram model on the same tokens, in one table.

python benchmarks/learning/compare.py DATA MODEL: DATA as prepare.py wrote it, MODEL a run's model folder.
The 5-gram model reads the training documents of books.jsonl and definitions.jsonl; both models then predict
every token of the held-out documents and the end of each. The trained model reads each document alone, as in
training, in windows of its training length that do not overlap, so it starts each window without context; the
5-gram model reads one stream and never does.
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


def stream(held: list[list[int]]) -> list[int]:
    """Documents one after the other, with one separator between them."""
    return [held[0][0], *(token for ids in held for token in ids[1:])]


def main(data: Path, model: Path) -> None:
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    separator = tokenizer.bos_id
    assert separator is not None

    def read(name: str) -> tuple[list[list[int]], int]:
        """Each document between two separators, and the bytes of all (an end counts as one)."""
        texts = documents(data / f"{name}.jsonl")
        ids = [[separator, *tokenizer.encode(text, parse_special=False), separator] for text in texts]
        return ids, sum(len(text.encode()) + 1 for text in texts)

    training = stream([ids for part in PARTS for ids in read(part)[0]])
    grams = KneserNey(training, vocab_size=checkpoint.config.vocab_size)
    print(f"{len(training):,} training tokens")
    print(f"{'held out':<14}{'tokens':>10}{'bytes':>10}{'5-gram':>10}{'model':>10}   bits per byte")
    with nemotron4.load(str(model), dtype="float32") as engine:
        for part in PARTS:
            held_out, num_bytes = read(f"{part}_held_out")
            ids = stream(held_out)
            theirs = -float(np.log2(grams.probabilities(ids)).sum()) / num_bytes
            windows = [doc[i : i + WINDOW + 1] for doc in held_out for i in range(0, len(doc) - 1, WINDOW)]
            ours = -sum(map(sum, engine.score(token_ids=windows))) / math.log(2) / num_bytes
            print(f"{part:<14}{len(ids) - 1:>10,}{num_bytes:>10,}{theirs:>10.4f}{ours:>10.4f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
