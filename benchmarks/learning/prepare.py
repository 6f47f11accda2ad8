"""Data and a tokenizer for the learning benchmark: python benchmarks/learning/prepare.py TEXT_FOLDER OUT

TEXT_FOLDER holds public text (its names and sources are in docs/results/training.md): books.jsonl.gz and
wordnet_definitions.jsonl.gz to pre-train on, and
reward_tm4_coffee.jsonl.gz, agent turns that people judged right or wrong, for the reward model and for pairs.
A conversation is held out as a whole, by a hash of its first words, so no test row has a sibling in training.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from nemotron4.checkpoint.write_huggingface import config_json
from nemotron4.model.presets import nano
from nemotron4.model.transformer import Transformer

VOCAB_SIZE = 2048
HELD_OUT_PERCENT = {"books": 5, "definitions": 2, "rewards": 20, "pairs": 20, "good_turns": 20}
JSON_SIGNS = str.maketrans("", "", '{}[]"')


def read(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def is_held_out(kind: str, key: str) -> bool:
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT[kind]


def split(kind: str, keyed: Iterable[tuple[str, dict[str, Any]]], out: Path) -> None:
    parts: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for key, row in keyed:
        parts[is_held_out(kind, key)].append(row)
    write(out / f"{kind}.jsonl", parts[False])
    write(out / f"{kind}_held_out.jsonl", parts[True])
    print(f"{kind}: {len(parts[False])} rows to train on, {len(parts[True])} held out")


def definitions(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """One document for each entry: `words (part of speech): definition; "example"`."""
    for row in rows:
        examples = "".join(f'; "{example}"' for example in row["examples"])
        text = f"{', '.join(row['words'])} ({row['pos']}): {row['definition']}{examples}"
        yield row["id"], {"text": text}


def turn(turn: dict[str, Any]) -> str:
    """A turn as one line: its text, or its call or reply without JSON's signs."""
    said = turn.get("text") or json.dumps(turn.get("api") or turn.get("response"), separators=(",", ":"))
    return f"{turn['role']}: {said.translate(JSON_SIGNS)}"


def first_words(row: dict[str, Any]) -> str:
    """What the customer asked first: the same for all turns of a conversation and for its variants."""
    return next((t["text"] for t in row["context"] if t["role"] == "user" and "text" in t), row["id"]).lower()


def rewards(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in rows:
        text = "\n".join(map(turn, (*row["context"], row["generation"])))
        label = [-100.0] * 4 + [float(row["reward"])] + [-100.0] * 4  # helpfulness is the fifth attribute
        yield first_words(row), {"text": text, "label": label}


def pairs(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every right turn with every wrong one of the same context."""
    by_context: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_context[json.dumps(row["context"])][row["reward"]].append(row)
    for judged in by_context.values():
        for right in judged.get(1.0, []):
            for wrong in judged.get(0.0, []):
                prompt = "\n".join(map(turn, right["context"])) + "\n"
                yield (
                    first_words(right),
                    {
                        "prompt": prompt,
                        "chosen": turn(right["generation"]),
                        "rejected": turn(wrong["generation"]),
                        "chosen_reward": 1.0,
                        "rejected_reward": 0.0,
                    },
                )


def good_turns(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Right turns as prompts and completions, to fine-tune on before preferences."""
    for row in rows:
        if row["reward"] == 1.0:
            prompt = "\n".join(map(turn, row["context"])) + "\n"
            yield first_words(row), {"prompt": prompt, "completion": turn(row["generation"])}


def make_start(out: Path) -> None:
    """A SentencePiece tokenizer with Nemotron's layout, learnt from the training text, and fresh weights."""
    sentencepiece.set_random_generator_seed(0)
    texts = [json.loads(line)["text"] for name in ("books", "definitions") for line in lines(out, name)]
    pieces = [piece for text in texts for piece in text.split("\n") if piece]
    pieces += [json.loads(line)["text"] for line in lines(out, "rewards")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(pieces),
        model_prefix=str(out / "tokenizer"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        user_defined_symbols=[f"<extra_id_{i}>" for i in range(16)],
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        input_sentence_size=100_000,
        shuffle_input_sentence=True,
        minloglevel=2,
    )
    start = out / "start"
    start.mkdir(exist_ok=True)
    (out / "tokenizer.model").rename(start / "tokenizer.model")
    (out / "tokenizer.vocab").unlink()
    config = nano()
    net = Transformer(config)
    net.initialise(seed=0)
    save_file(net.state_dict(), start / "model.safetensors", metadata={"format": "pt"})
    values = config_json(config, dtype=torch.float32) | {"bos_token_id": 2, "eos_token_id": 3}
    (start / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(f"start: {config.num_parameters:,} parameters, {config.vocab_size} tokens")


def lines(out: Path, name: str) -> list[str]:
    return (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()


def main(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    books = read(source / "books.jsonl.gz")
    split("books", ((row["id"], {"text": row["text"]}) for row in books), out)
    split("definitions", definitions(read(source / "wordnet_definitions.jsonl.gz")), out)
    judged = list(read(source / "reward_tm4_coffee.jsonl.gz"))
    split("rewards", rewards(judged), out)
    split("pairs", pairs(judged), out)
    split("good_turns", good_turns(judged), out)
    make_start(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
