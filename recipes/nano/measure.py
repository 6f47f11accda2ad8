"""What the nano models are measured by; each command writes one JSON file.

    python recipes/nano/measure.py text DATA MODEL OUT        bits per byte, and a 5-gram model's
    python recipes/nano/measure.py rewards DATA MODEL OUT     how a reward model separates right from wrong
    python recipes/nano/measure.py answers DATA ANSWERS OUT   format and sense of answers to asked.jsonl

DATA is what prepare.py wrote. Bits per byte: every token of a held-out document is predicted, and its end.
The trained model reads each document alone, in windows of its training length that do not overlap; the
5-gram model reads one stream. AUC is the share of (right, wrong) pairs whose right turn scores higher, ties
counted half; its interval is a bootstrap over rows. The rules for answers are in recipe.toml.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ngram import KneserNey
from numpy.typing import NDArray
from prepare import rows_of

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.inference.reward import load_reward
from nemotron4.records import Message
from nemotron4.runs import read_rows
from nemotron4.text.formats import LABEL_START
from nemotron4.text.prompt import encode_reward

WINDOW = 512
LONGEST_TURNS = 256  # as in align.toml
PARTS = ("books", "definitions")
NUM_ROUNDS = 1000
END = "\n<extra_id_1>"
DRINKS = {"americano", "cappuccino", "chai", "cocoa", "cortado", "espresso", "frappe", "latte", "lemonade",
          "macchiato", "matcha", "mocha", "smoothie", "tea", "water"}  # fmt: skip


def text(data: Path, model: Path) -> dict[str, Any]:
    checkpoint = open_checkpoint(model)
    tokenizer = checkpoint.tokenizer()
    separator = tokenizer.bos_id
    assert separator is not None

    def read(name: str) -> tuple[list[list[int]], int]:
        """Each document between two separators, and the bytes of all (an end counts as one)."""
        texts = [row["text"] for row in rows_of(data, name)]
        ids = [[separator, *tokenizer.encode(text, parse_special=False), separator] for text in texts]
        return ids, sum(len(text.encode()) + 1 for text in texts)

    training = stream([ids for part in PARTS for ids in read(part)[0]])
    grams = KneserNey(training, vocab_size=checkpoint.config.vocab_size)
    found: dict[str, Any] = {"training tokens": len(training)}
    with nemotron4.load(str(model), dtype="float32") as engine:
        for part in PARTS:
            held_out, num_bytes = read(f"{part}_held_out")
            ids = stream(held_out)
            theirs = -float(np.log2(grams.probabilities(ids)).sum()) / num_bytes
            windows = [doc[i : i + WINDOW + 1] for doc in held_out for i in range(0, len(doc) - 1, WINDOW)]
            ours = -sum(map(sum, engine.score(token_ids=windows))) / math.log(2) / num_bytes
            found[part] = {"tokens": len(ids) - 1, "bytes": num_bytes, "5-gram": theirs, "model": ours}
    return found


def stream(documents: list[list[int]]) -> list[int]:
    """Documents one after the other, with one separator between them."""
    return [documents[0][0], *(token for ids in documents for token in ids[1:])]


def rewards(data: Path, model: Path) -> dict[str, Any]:
    """A model with the card's markers reads conversations, another one their lines."""
    engine = load_reward(model, dtype="float32")
    tokenizer = engine.tokenizer
    if LABEL_START in tokenizer.markers:
        rows = rows_of(data, "rewards_held_out")
        labels = [row["attributes"]["helpfulness"] for row in rows]
        ids = [encode_reward(tokenizer, [Message.from_json(m) for m in row["messages"]]) for row in rows]
        longest = LONGEST_TURNS
    else:
        rows = rows_of(data, "turns_held_out")
        labels = [row["label"][4] for row in rows]
        ids = [tokenizer.encode(row["text"]) for row in rows]
        longest = engine.info.context_length
    fitting = [i for i, row in enumerate(ids) if len(row) <= longest]
    scores = np.array(
        [found.attributes["helpfulness"] for found in engine.score_ids([ids[i] for i in fitting])]
    )
    is_right = np.array([labels[i] == 1.0 for i in fitting])
    generator = np.random.default_rng(0)
    draws = (generator.integers(len(scores), size=len(scores)) for _ in range(NUM_ROUNDS))
    low, high = np.percentile([auc(scores[draw], is_right[draw]) for draw in draws], [2.5, 97.5])
    counts = {
        "right": int(is_right.sum()),
        "wrong": int((~is_right).sum()),
        "too long": len(ids) - len(fitting),
    }
    return {"auc": auc(scores, is_right), "low": float(low), "high": float(high), **counts}


def auc(scores_N: NDArray[np.float64], is_right_N: NDArray[np.bool_]) -> float:
    """Mann and Whitney's statistic over the number of pairs."""
    right, wrong = scores_N[is_right_N], np.sort(scores_N[~is_right_N])
    below = np.searchsorted(wrong, right, side="left") + np.searchsorted(wrong, right, side="right")
    return float(below.mean() / 2 / max(1, len(wrong)))


def words(said: str) -> set[str]:
    return set(re.findall(r"[a-z']+", said.lower().replace("\u2019", "'")))


def is_sensible(said: str, conversation: list[dict[str, str]], known: set[str]) -> bool:
    found = words(said)
    context = set().union(*(words(message["content"]) for message in conversation))
    asked = set().union(*(words(m["content"]) for m in conversation if m["role"] == "user")) & DRINKS
    strange = found & DRINKS - context if asked else set()
    return len(said.split()) >= 2 and found <= known | context and not strange


def answers(data: Path, answered: Path) -> dict[str, Any]:
    known = set()
    for name in ("sft_dialogues", "sft_turns"):
        for row in rows_of(data, name):
            known |= set().union(*(words(m["content"]) for m in row["messages"] if m["role"] == "assistant"))
    asked, rows = rows_of(data, "asked"), list(read_rows(answered))
    judged = []
    for question, row in zip(asked, rows, strict=True):
        ends = row["finish_reason"] == "stop" and row["text"].endswith(END)
        said = row["text"].removesuffix(END)
        sensible = ends and is_sensible(said, question["messages"], known)
        person = question["meta"]["person"]
        judged.append(
            {"asked": [m["content"] for m in question["messages"]], "answer": row["text"], "person": person,
             "ends": ends, "sensible": sensible,
             "person sensible": is_sensible(person, question["messages"], known)}
        )  # fmt: skip
    shares = {
        name: float(np.mean([row[name] for row in judged]))
        for name in ("ends", "sensible", "person sensible")
    }
    return {
        "answers": len(judged),
        "different": len({row["answer"] for row in judged}),
        **shares,
        "rows": judged,
    }


COMMANDS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "text": text,
    "rewards": rewards,
    "answers": answers,
}

if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    measured = COMMANDS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    Path(sys.argv[4]).write_text(json.dumps(measured, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in measured.items() if name != "rows"}))
