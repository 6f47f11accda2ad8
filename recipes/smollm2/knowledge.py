"""What the adapter keeps of what the base knew: human text, and which word a definition belongs to.

    python recipes/smollm2/knowledge.py TEXTS OUT.json [--adapter FOLDER] [--texts 200] [--questions 1000]

TEXTS is a folder as docs/results/nano.md lists it; nothing of it is in this recipe's training. Both models
are scored without a template, each as it is served; differences are of the same item.

- Text: 1,500 characters from the beginning of chapters, by the log-probability of all their tokens.
- WordNet: a noun's definition and four nouns, one of them the right one; the likeliest word wins, by the
  log-probability of its tokens behind "A word for DEFINITION is the word". Chance is 25 %.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemotron4
from nemotron4.client.engine import EngineChatModel
from nemotron4.client.interface import ManyLogprobs
from nemotron4.grading.statistics import mcnemar, standard_error, wilson
from nemotron4.inference.engine import Engine
from nemotron4.records import read_json_lines
from nemotron4.runs import write_json

CHARACTERS, CHOICES = 1500, 4
AT_ONCE = 128  # questions; the engine's queue is not endless


def texts(folder: Path, count: int) -> list[str]:
    chapters = [str(row["text"])[:CHARACTERS] for _, row in read_json_lines(folder / "books.jsonl.gz")]
    long = [text for text in chapters if len(text) == CHARACTERS]
    return random.Random(0).sample(long, min(count, len(long)))


def questions(folder: Path, count: int) -> list[tuple[str, list[str], int]]:
    """(beginning, words, the right one's place)."""
    nouns = [
        (str(row["definition"]), str(row["words"][0]))
        for _, row in read_json_lines(folder / "wordnet_definitions.jsonl.gz")
        if row["pos"] == "noun" and str(row["words"][0]).isalpha() and str(row["words"][0]).islower()
    ]
    draw = random.Random(1)
    made = []
    for definition, word in draw.sample(nouns, min(count, len(nouns))):
        others = dict.fromkeys(other for _, other in draw.sample(nouns, 3 * CHOICES) if other != word)
        words = [word, *list(others)[: CHOICES - 1]]
        draw.shuffle(words)
        made.append((f"A word for {definition} is the word", words, words.index(word)))
    return made


def text_scores(engine: Engine, chosen: Sequence[str]) -> list[float]:
    """Mean log-probability of a token of each text, nats."""
    return [statistics.fmean(scores) for scores in engine.score(chosen)]


async def right_answers(engine: Engine, asked: Sequence[tuple[str, list[str], int]]) -> list[bool]:
    chat, turns = EngineChatModel(engine), asyncio.Semaphore(AT_ONCE)

    async def weigh(beginning: str, words: Sequence[str]) -> ManyLogprobs:
        async with turns:
            return await chat.continuation_logprobs(beginning, [f" {word}" for word in words])

    weighed = await asyncio.gather(*(weigh(beginning, words) for beginning, words, _ in asked))
    totals = [[sum(token.logprob for token in tokens) for tokens in each] for each in weighed]
    return [sums.index(max(sums)) == right for sums, (_, _, right) in zip(totals, asked, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapter", default="auto", help="default: the one that ships")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--questions", type=int, default=1000)
    options = parser.parse_args()
    chosen, asked = texts(options.folder, options.texts), questions(options.folder, options.questions)
    scores, answers = [], []
    for adapter in (None, options.adapter):
        with nemotron4.load("smollm2", adapter=adapter) as engine:
            scores.append(text_scores(engine, chosen))
            answers.append(asyncio.run(right_answers(engine, asked)))
    write_json(options.out, compared(scores, answers))
    print(options.out.read_text(encoding="utf-8"))


def compared(scores: Sequence[Sequence[float]], answers: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Bare first, then with the adapter."""
    differences = [after - before for before, after in zip(*scores, strict=True)]
    table: dict[str, Any] = {
        "texts": len(differences),
        "nats_per_token": [-statistics.fmean(each) for each in scores],
        "change": [-statistics.fmean(differences), standard_error(differences)],
        "questions": len(answers[0]),
    }
    for name, each in zip(("bare", "adapter"), answers, strict=True):
        interval = wilson(sum(each), len(each))
        table[name] = [sum(each), 100 * interval.lower, 100 * interval.upper]
    test = mcnemar(*answers)
    return table | {"test": test.method, "p": test.p_value}


if __name__ == "__main__":
    main()
