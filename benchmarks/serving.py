"""Our engine beside transformers' ``generate``: same random weights, float32, same prompts, one process.

    python benchmarks/serving.py [--models nano small] [--rounds 3] [--threads 2] [--out FILE.json]

Prompts are random token ids (128 each; prefill: one of 1,024), 128 greedy tokens each. A round measures both
engines one after the other, so that a noisy machine disturbs both; the ratio is the median of the rounds'
ratios. Needs the ``dev`` extra (transformers).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import NemotronConfig, NemotronForCausalLM, PreTrainedTokenizerFast

import nemotron4
from nemotron4.inference.engine import Engine

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


def run_ours(engine: Engine, case: Case, rows: list[list[int]]) -> list[list[int]]:
    generations = engine.generate(rows, max_new_tokens=case.num_new, temperature=0, stop_token_ids=())
    return [list(generation.token_ids) for generation in generations]


def run_peer(peer: NemotronForCausalLM, case: Case, rows: list[list[int]]) -> list[list[int]]:
    ids = torch.tensor(rows)
    with torch.inference_mode():
        out = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=case.num_new,
            min_new_tokens=case.num_new,
            do_sample=False,
        )
    return out[:, case.prompt_length :].tolist()


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(name: str, *, rounds: int, cases: list[Case]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(name, Path(folder))
        peer = NemotronForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with nemotron4.load(folder) as engine:
            for case in cases:
                rows.append({"model": name, **measure_case(engine, peer, case, rounds=rounds)})
                print(json.dumps(rows[-1]), flush=True)
    return rows


def measure_case(engine: Engine, peer: NemotronForCausalLM, case: Case, *, rounds: int) -> dict[str, object]:
    vocabulary = engine.info.vocab_size
    warm_up = Case("warm-up", min(case.num_sequences, 4), 32, 4)
    run_ours(engine, warm_up, prompts(warm_up, vocabulary, 99))
    run_peer(peer, warm_up, prompts(warm_up, vocabulary, 99))
    ours, theirs, equal, total = [], [], 0, 0
    for seed in range(rounds):
        rows = prompts(case, vocabulary, seed)  # new ones each round: nothing is found in the prefix cache
        seconds, tokens = timed(lambda rows=rows: run_ours(engine, case, rows))
        ours.append(case.counted_tokens / seconds)
        seconds, peer_tokens = timed(lambda rows=rows: run_peer(peer, case, rows))
        theirs.append(case.counted_tokens / seconds)
        equal += sum(a == b for a, b in zip(tokens, peer_tokens, strict=True))
        total += len(rows)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "case": case.name,
        "ours_tokens_per_s": round(statistics.median(ours), 1),
        "transformers_tokens_per_s": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "equal_sequences": f"{equal}/{total}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [case for case in CASES if case.name in arguments.cases]
    rows = [row for name in arguments.models for row in measure(name, rounds=arguments.rounds, cases=cases)]
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
