"""Rows, a tokenizer and fresh weights from public text: python recipes/nano/prepare.py TEXT_FOLDER OUT

TEXT_FOLDER holds the files that docs/results/nano.md lists with their sources. A book's chapter, a
definition and a conversation are held out whole: a conversation by a hash of its first words, so that no
test row has a sibling in training.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import io
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from nemotron4.checkpoint.write_huggingface import config_json
from nemotron4.model.config import ModelConfig
from nemotron4.model.presets import nano
from nemotron4.model.transformer import Transformer

Row = dict[str, Any]
VOCAB_SIZE, TOKENIZER_LINES = 2048, 100_000
HELD_OUT_PERCENT = {"books": 5, "definitions": 2}  # of conversations: 20
NUM_ASKED = 200
JSON_SIGNS = str.maketrans("", "", '{}[]"')
ROLES = {"agent": "assistant", "user": "user", "api": "user"}


def read(path: Path) -> Iterator[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def is_held_out(kind: str, key: str) -> bool:
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT.get(kind, 20)


def split(kind: str, keyed: Iterable[tuple[str, Row]], out: Path, share: float) -> None:
    """Write the rows to train on, the first ``share`` of them, and those held out."""
    parts: dict[bool, list[Row]] = {False: [], True: []}
    for key, row in keyed:
        parts[is_held_out(kind, key)].append(row)
    for held_out, rows in parts.items():
        rows = rows[: max(1, round(share * len(rows)))]
        write(out / f"{kind}{'_held_out' * held_out}.jsonl", rows)
        print(f"{kind}: {len(rows)} rows {'held out' if held_out else 'to train on'}")


def definitions(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """One document for each entry: `words (part of speech): definition; "example"`."""
    for row in rows:
        examples = "".join(f'; "{example}"' for example in row["examples"])
        text = f"{', '.join(row['words'])} ({row['pos']}): {row['definition']}{examples}"
        yield row["id"], {"text": text}


# ---- Conversations at a coffee bar: orders and small talk (an empty system text), and turns of an agent with
# calls, which people judged (the bar's greeting is the system text).


def dialogues(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    for row in rows:
        yield row["messages"][0]["content"].lower(), {"messages": row["messages"]}


def as_text(keyed: Iterable[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    for key, row in keyed:
        said = (f"{message['role'].capitalize()}: {message['content']}" for message in row["messages"])
        yield key, {"text": "\n".join(said)}


def asked(rows: Iterable[Row]) -> Iterator[Row]:
    """Conversations up to their first or their last user turn, in turn; ``meta`` has a person's answer."""
    for number, row in enumerate(rows):
        places = [place for place, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        place = places[-1 if number % 2 else 0]
        yield {"messages": row["messages"][:place], "meta": {"person": row["messages"][place]["content"]}}


def said(turn: Row) -> str:
    """A turn as one line: its text, or its call or reply without JSON's signs."""
    text = turn.get("text") or json.dumps(turn.get("api") or turn.get("response"), separators=(",", ":"))
    return str(text.translate(JSON_SIGNS))


def messages(context: list[Row]) -> list[dict[str, str]]:
    """The greeting as system text; what the agent's calls returned as turns of the user."""
    is_greeted = context[0]["role"] == "agent"
    found = [{"role": "system", "content": said(context[0]) if is_greeted else ""}]
    for turn in context[is_greeted:]:
        role, text = ROLES[turn["role"]], said(turn)
        if found[-1]["role"] == role:
            found[-1]["content"] += f"\n{text}"
        else:
            found.append({"role": role, "content": text})
    return found


def first_words(row: Row) -> str:
    """What the customer asked first: the same for all turns of a conversation and for its variants."""
    return next((t["text"] for t in row["context"] if t["role"] == "user" and "text" in t), row["id"]).lower()


def answer(row: Row) -> dict[str, str]:
    return {"role": "assistant", "content": said(row["generation"])}


def rewards(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    for row in rows:
        judged = [*messages(row["context"]), answer(row)]
        yield first_words(row), {"messages": judged, "attributes": {"helpfulness": row["reward"]}}


def turns(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """The same for a reward model without the card's format: lines of text, NeMo-Aligner's form."""
    for row in rows:
        text = "\n".join(f"{t['role']}: {said(t)}" for t in (*row["context"], row["generation"]))
        label = [-100.0] * 4 + [float(row["reward"])] + [-100.0] * 4  # helpfulness is the fifth attribute
        yield first_words(row), {"text": text, "label": label}


def right_turns(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """What people judged right, to fine-tune on before preferences; the turns before it are context alone."""
    for row in rows:
        if row["reward"] == 1.0:
            before = [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages(row["context"])]
            yield first_words(row), {"messages": [*before, answer(row)]}


def pairs(rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    """Every right turn with every wrong one of the same context."""
    by_context: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_context[json.dumps(row["context"])][row["reward"]].append(row)
    for judged in by_context.values():
        for right in judged.get(1.0, []):
            for wrong in judged.get(0.0, []):
                texts = {"chosen": said(right["generation"]), "rejected": said(wrong["generation"])}
                scores = {"chosen_reward": 1.0, "rejected_reward": 0.0}
                yield first_words(right), {"prompt": messages(right["context"]), **texts, **scores}


# ---- The tokenizer, and fresh weights


def make_tokenizer(out: Path) -> None:
    """SentencePiece with the card's properties, learnt from the training text alone.

    The lines are drawn here: what SentencePiece draws itself differs from process to process.
    """
    names = ("books", "definitions", "dialogues", "turns")
    lines = [line for name in names for row in rows_of(out, name) for line in row["text"].split("\n") if line]
    chosen = random.Random(0).sample(lines, min(TOKENIZER_LINES, len(lines)))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(chosen),
        model_writer=model,  # with a prefix the model would keep the folder's path
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
        minloglevel=2,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())


def rows_of(out: Path, name: str) -> list[Row]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def make_start(folder: Path, tokenizer: Path, config: ModelConfig, *, seed: int = 0) -> None:
    """Fresh weights of a shape, with the tokenizer, as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    net = Transformer(config)
    net.initialise(seed=seed)
    save_file(net.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    values = config_json(config, dtype=torch.float32) | {"bos_token_id": 2, "eos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="TEXT_FOLDER")
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, for a try of a minute")
    parser.add_argument("--layers", type=int, default=nano().num_layers)
    options = parser.parse_args()
    source, out, share = options.source, options.out, options.share
    out.mkdir(parents=True, exist_ok=True)
    books = ((row["id"], {"text": row["text"]}) for row in read(source / "books.jsonl.gz"))
    split("books", books, out, share)
    split("definitions", definitions(read(source / "wordnet_definitions.jsonl.gz")), out, share)
    talked = list(dialogues(read(source / "dialogues_tm4_coffee.jsonl.gz")))
    split("sft_dialogues", talked, out, share)
    split("dialogues", as_text(talked), out, share)
    judged = [row for row in read(source / "reward_tm4_coffee.jsonl.gz") if row["context"]]  # six have none
    for kind, rows in (("rewards", rewards), ("turns", turns), ("sft_turns", right_turns), ("pairs", pairs)):
        split(kind, rows(judged), out, share)
    write(out / "asked.jsonl", asked(rows_of(out, "sft_dialogues_held_out")[:NUM_ASKED]))
    make_tokenizer(out)
    config = dataclasses.replace(nano(), num_layers=options.layers)
    make_start(out / "start", out / "tokenizer.model", config)
    print(f"start: {config.num_parameters:,} parameters, {config.vocab_size} tokens")


if __name__ == "__main__":
    main()
