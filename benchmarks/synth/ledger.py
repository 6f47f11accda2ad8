"""A ledger with a million paid replies: size on disk, writing speed, time of ``status``, memory.

    python benchmarks/synth/ledger.py --rows 1000000

Each row is a reply of about 350 tokens of English (taken from Python's own help texts) and the record made of
it, which holds the prompt and the reply again.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import orjson

from nemotron4 import config
from nemotron4.synth import tables
from nemotron4.synth.books import read_books
from nemotron4.synth.effects import DONE, Child, Effects, StoredReply
from nemotron4.synth.keys import digest, record_id
from nemotron4.synth.ledger import Ledger, Reader
from nemotron4.synth.recipe import Recipe

WORDS_PER_REPLY = 260
BATCH = 256


def effects(number: int, words: list[str], draw: random.Random) -> tuple[Child, Effects]:
    entry = orjson.dumps({"kind": "root", "index": number})
    root = Child("root:in", number, entry, record_id("root:in", None, number), None)
    start = draw.randrange(len(words) - WORDS_PER_REPLY)
    text = " ".join(words[start : start + WORDS_PER_REPLY])
    said = {"text": text, "finish": "stop", "model": "m"}
    reply = StoredReply(root.id, digest("key", number), "in", 0, said, 130, 350, 900, 1)
    response = {"text": text, "model": "m", "sample": 0, "finish_reason": "stop", "tokens": 350}
    prompt = {"messages": [["user", text[:300]]], "task": "open_qa"}
    row = {"kind": "answered", "prompt": prompt, "responses": [response]}
    child = Child("in", 0, orjson.dumps(row), record_id("in", root.id, 0), root.id)
    done = Effects("in", root.id, DONE, b"cfg", replies=[reply], children=[child], tally={"calls": 1.0})
    done.parent_content, done.sources = entry, [reply]
    return root, done


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows
    words = " ".join(topics.values()).split()
    draw = random.Random(1)
    recipe = config.build(Recipe, {"name": "bench", "stage": [{"name": "in", "kind": "respond"}]})
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "ledger.sqlite"
        ledger = Ledger(path)
        started = time.perf_counter()
        for first in range(0, rows, BATCH):
            pairs = [effects(number, words, draw) for number in range(first, min(rows, first + BATCH))]
            with ledger.transaction() as db:
                tables.insert_roots(db, "in", [root for root, _ in pairs])
                tables.apply(db, [done for _, done in pairs])
        write_s = time.perf_counter() - started
        ledger.close()
        started = time.perf_counter()
        with Reader(path) as reader:
            books = read_books(reader, recipe)
        status_s = time.perf_counter() - started
        size = sum(file.stat().st_size for file in Path(name).iterdir())
    assert books.is_balanced
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {
        "replies": rows,
        "records": 2 * rows,
        "size_gb": round(size / 1e9, 3),
        "rows_per_s": round(rows / write_s),
        "status_s": round(status_s, 3),
        "max_rss_mb": round(rss),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
