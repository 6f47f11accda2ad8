"""Our engine beside transformers' ``generate``: same random weights, float32, same prompts, one process.

    python benchmarks/serving.py [--models nano small] [--rounds 3] [--threads 2] [--out FILE.json]

Prompts are random token ids (128 each; prefill: one of 1,024), 128 greedy tokens each. Each engine lives in a
process of its own, because the OpenMP workers of two engines in one process slow each other down; they take
turns, so that a noisy machine disturbs both. The ratio is the median of the rounds' ratios. Needs the ``dev``
extra (transformers).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import NemotronConfig, NemotronForCausalLM, PreTrainedTokenizerFast

import nemotron4

# hidden, layers, heads, kv heads, ffn, vocabulary: 18.9 M and 124.7 M parameters
SHAPES = {"nano": (384, 8, 6, 2, 1536, 8192), "small": (768, 12, 12, 4, 3072, 32000)}
PROMPT, NEW = 128, 128


@dataclass(frozen=True)
class Case:
    name: str
    num_sequences: int
    prompt_length: int
    num_new: int

    @property
    def counted_tokens(self) -> int:
        """Generated tokens, or prompt tokens where only the prompt counts."""
        return self.num_sequences * (self.num_new if self.num_new > 1 else self.prompt_length)


Run = Callable[["Case", list[list[int]]], list[list[int]]]

CASES = (
    Case("decode, 1 sequence", 1, PROMPT, NEW),
    Case("32 sequences", 32, PROMPT, NEW),
    Case("128 sequences", 128, PROMPT, NEW),
    Case("prefill 1,024", 1, 1024, 1),
)


def write_model(name: str, folder: Path) -> None:
    hidden, layers, heads, kv_heads, ffn, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    NemotronForCausalLM(config).save_pretrained(folder)
    pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"token{i}" for i in range(vocabulary - len(pieces))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)


def prompts(case: Case, vocabulary: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [
        [generator.randrange(300, vocabulary) for _ in range(case.prompt_length)]
        for _ in range(case.num_sequences)
    ]


def open_ours(folder: str) -> Run:
    engine = nemotron4.load(folder)

    def run(case: Case, rows: list[list[int]]) -> list[list[int]]:
        settings = {"max_new_tokens": case.num_new, "temperature": 0, "ignore_eos": True}
        return [list(generation.token_ids) for generation in engine.generate(rows, **settings)]

    return run


def open_transformers(folder: str) -> Run:
    model = NemotronForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(case: Case, rows: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(rows)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=case.num_new,
                min_new_tokens=case.num_new,
                do_sample=False,
            )
        return out[:, case.prompt_length :].tolist()

    return run


def work(connection: Connection, open_engine: Callable[[str], Run], folder: str, threads: int) -> None:
    """The engine's process: receives a case and its prompts, sends seconds and tokens."""
    torch.set_num_threads(threads)
    run = open_engine(folder)
    connection.send("ready")
    while (job := connection.recv()) is not None:
        start = time.perf_counter()
        tokens = run(*job)
        connection.send((time.perf_counter() - start, tokens))


def measure(name: str, *, rounds: int, cases: list[Case], threads: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_model(name, Path(folder))
        workers: list[tuple[Connection, BaseProcess]] = []
        for open_engine in (open_ours, open_transformers):
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, open_engine, folder, threads), daemon=True)
            process.start()
            here.recv()
            workers.append((here, process))
        for case in cases:
            rows.append({"model": name, **measure_case([w[0] for w in workers], case, name, rounds)})
            print(json.dumps(rows[-1]), flush=True)
        for connection, process in workers:
            connection.send(None)
            process.join()
    return rows


def measure_case(workers: list[Connection], case: Case, name: str, rounds: int) -> dict[str, object]:
    vocabulary = SHAPES[name][-1]

    def ask(worker: Connection, job: Case, seed: int) -> tuple[float, list[list[int]]]:
        worker.send((job, prompts(job, vocabulary, seed)))
        seconds, tokens = worker.recv()
        return job.counted_tokens / seconds, tokens

    for worker in workers:
        ask(worker, Case("warm-up", min(case.num_sequences, 4), 32, 4), 99)
    ours, theirs, equal = [], [], 0
    for seed in range(rounds):  # new prompts each round: nothing is found in the prefix cache
        (our_rate, our_tokens), (their_rate, their_tokens) = (ask(worker, case, seed) for worker in workers)
        ours.append(our_rate)
        theirs.append(their_rate)
        equal += sum(a == b for a, b in zip(our_tokens, their_tokens, strict=True))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "case": case.name,
        "ours_tokens_per_s": round(statistics.median(ours), 1),
        "transformers_tokens_per_s": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "equal_sequences": f"{equal}/{rounds * case.num_sequences}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.name in arguments.cases]
    rows = [
        row
        for name in arguments.models
        for row in measure(name, rounds=arguments.rounds, cases=cases, threads=arguments.threads)
    ]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {arguments.threads} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
