"""Corpora for pre-training: how fast texts are tokenized, and what shuffling costs at 8 trillion tokens.

    python benchmarks/pretraining.py tokenize TEXTS.jsonl --model smollm2 [--workers 2] [--rounds 3]
    python benchmarks/pretraining.py simulate [--tokens 8e12]

``tokenize``: `nemotron4 data tokenize`, whole command, against the tokenizers library alone (``encode_batch``
on all processors, texts in memory, reading not counted), taking turns. ``simulate``: the windows of an
imagined corpus, with the time and the memory of the table, of a window anywhere, and of a blend's position.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

from nemotron4.records import open_text


def tokenize(file: Path, model: str, workers: int, rounds: int) -> None:
    import tokenizers

    from nemotron4.checkpoint import open_checkpoint

    with open_text(file, "utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    specification = open_checkpoint(model).tokenizer().specification  # type: ignore[attr-defined]
    library = tokenizers.Tokenizer.from_str(json.dumps(specification))
    speeds: dict[str, list[float]] = {"library": [], "command": [], "command without its start": []}
    empty = Path(tempfile.mkdtemp()) / "one.jsonl"
    empty.write_text('{"text": "one"}\n')
    for _ in range(rounds):
        began = time.perf_counter()
        library.encode_batch(texts, add_special_tokens=False)
        speeds["library"].append(megabytes / (time.perf_counter() - began))
        whole, start = (_command(path, model, workers) for path in (file, empty))
        speeds["command"].append(megabytes / whole)
        speeds["command without its start"].append(megabytes / (whole - start))
    print(f"{megabytes:.1f} MB of text, {workers} workers, {os.cpu_count()} processors, {rounds} rounds")
    for name, values in speeds.items():
        middle = statistics.median(values)
        share = middle / statistics.median(speeds["library"])
        print(f"{name:<28}{middle:6.2f} MB/s  {share:4.0%}   {[round(value, 2) for value in values]}")


def _command(file: Path, model: str, workers: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "nemotron4", "data", "tokenize", str(file), "--model", model]
        began = time.perf_counter()
        done = subprocess.run(
            [*command, "--out", f"{folder}/c", "--workers", str(workers)], capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return time.perf_counter() - began


class Imagined:
    """Documents of 7,488 to 8,511 tokens, computed and not stored."""

    prefix = fingerprint = "imagined"

    def __init__(self, num_tokens: float) -> None:
        self.num_documents = int(num_tokens / 7999.5)

    def lengths(self, documents: numpy.ndarray) -> numpy.ndarray:
        return 7488 + (documents * 2_654_435_761 >> 7) % 1024

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> numpy.ndarray:
        length = int(self.lengths(numpy.array([document]))[0])
        return numpy.full(min(length, length if stop is None else stop) - start, 7)


def simulate(num_tokens: float) -> None:
    from nemotron4.training.corpus import CorpusWindows, Packing
    from nemotron4.training.dataset import Dataset

    os.environ["NEMOTRON4_CACHE"] = tempfile.mkdtemp()
    before = _megabytes()
    began = time.perf_counter()
    windows = CorpusWindows(Imagined(num_tokens), Packing(4096, 2, 100), seed=0)
    made = time.perf_counter() - began
    print(f"{num_tokens:.1e} tokens in {windows._num:,} documents: {len(windows):,} windows of 4,096")
    print(f"table        {made:8.1f} s, {len(windows._ends):,} groups, {windows._ends.nbytes / 1e6:.2f} MB")
    order = windows.order(0)
    for share in (0.0, 0.31, 0.77, 0.9999):
        place = int(share * len(windows))
        began = time.perf_counter()
        sample = windows[order[place]]
        first = time.perf_counter() - began
        began = time.perf_counter()
        for more in range(1, 101):
            windows[order[place + more]]
        each = (time.perf_counter() - began) / 100
        print(
            f"place {place:>13,}: {len(sample.segments)} documents, {first * 1e3:.1f} ms, "
            f"then {each * 1e3:.2f} ms each"
        )
    sizes = (len(windows), len(windows) // 5, len(windows) // 5)
    blend = Dataset(range(sum(sizes)), 0, sizes, (0.7, 0.15, 0.15))  # type: ignore[arg-type]
    began = time.perf_counter()
    source, visit = blend._drawn(1_950_000_000)
    print(f"blend        position 1,950,000,000 is visit {visit:,} of source {source}: "
          f"{(time.perf_counter() - began) * 1e3:.1f} ms")  # fmt: skip
    print(
        f"memory       {_megabytes() - before:.0f} MB above the {before:.0f} MB of the libraries, at its peak"
    )


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    of_tokenize = commands.add_parser("tokenize")
    of_tokenize.add_argument("file", type=Path)
    of_tokenize.add_argument("--model", default="smollm2")
    of_tokenize.add_argument("--workers", type=int, default=os.cpu_count())
    of_tokenize.add_argument("--rounds", type=int, default=3)
    commands.add_parser("simulate").add_argument("--tokens", type=float, default=8e12)
    given = parser.parse_args()
    if given.command == "tokenize":
        tokenize(given.file, given.model, given.workers, given.rounds)
    else:
        simulate(given.tokens)


if __name__ == "__main__":
    main()
