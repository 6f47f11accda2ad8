"""What following a JSON schema costs: processor time a token, with and without, in one batch.

    python benchmarks/structured_output.py [--model smollm2] [--rows 32] [--tokens 48] [--rounds 5]

Both rounds decode the same prompts with the same seeds, in turn. The medians, their ratio, and the time to
compute one row's mask are printed as JSON. Processor time, so that a busy machine changes it little.

    python benchmarks/structured_output.py --schemas FOLDER

How many schemas below a folder (JSONSchemaBench's ``data``) can be followed, and why the others cannot.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections import Counter
from pathlib import Path

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.engine import Grammar, SamplingParams
from nemotron4.errors import RequestError
from nemotron4.inference.engine import Engine
from nemotron4.text.structured_output import GrammarVocabulary, json_schema

TEXT = {"type": "string"}
SCHEMA = {
    "type": "object",
    "properties": {"name": TEXT, "age": {"type": "integer"}, "tags": {"type": "array", "items": TEXT},
                   "bio": TEXT},
    "required": ["name", "age", "tags", "bio"],
    "additionalProperties": False,
}  # fmt: skip
DOCUMENT = '{"name": "Ann Lee", "age": 33, "tags": ["a", "bb"], "bio": "She walks'


def ms_per_token(engine: Engine, grammar: Grammar | None, rows: int, tokens: int) -> float:
    requests = [
        engine.request(
            f"Describe person {i} as JSON: ",
            SamplingParams(max_new_tokens=tokens, temperature=0.8, seed=i, grammar=grammar, ignore_eos=True),
        )
        for i in range(rows)
    ]
    start = time.process_time()
    steps = engine.collect(requests)
    return 1000 * (time.process_time() - start) / sum(map(len, steps))


def followed(model: str, folder: Path) -> dict[str, object]:
    """Schemas that can be followed of all, by folder, and the reasons of the others without their names."""
    tokenizer = open_checkpoint(model).tokenizer()
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.vocab_size)
    counts: dict[str, list[int]] = {}
    reasons: Counter[str] = Counter()
    for path in sorted(folder.rglob("*.json")):
        count = counts.setdefault(path.parent.name, [0, 0])
        count[1] += 1
        try:
            vocabulary.follow(json_schema(json.loads(path.read_text(encoding="utf-8"))))
            count[0] += 1
        except RequestError as error:
            reasons[
                re.sub(r"[:[].*", "", error.message.removeprefix("the JSON schema cannot be followed: "))
            ] += 1
    total = [sum(each) for each in zip(*counts.values(), strict=True)]
    return {"followed": total[0], "of": total[1], "by_folder": counts, "refused": dict(reasons.most_common())}


def mask_ms(engine: Engine, grammar: Grammar) -> list[float]:
    """The time of each mask along one document."""
    follower = GrammarVocabulary(engine.tokenizer, engine.info.vocab_size).follow(grammar)
    times = []
    for token_id in engine.tokenizer.encode(DOCUMENT):
        start = time.perf_counter()
        follower.allowed()
        times.append(1000 * (time.perf_counter() - start))
        follower.consume(token_id)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    for name, value in (("rows", 32), ("tokens", 48), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--schemas", type=Path)
    settings = parser.parse_args()
    if settings.schemas is not None:
        print(json.dumps(followed(settings.model, settings.schemas)))
        return
    grammar = json_schema(SCHEMA)
    with nemotron4.load(settings.model) as engine:
        found: dict[str, list[float]] = {"plain": [], "schema": []}
        for _ in range(settings.rounds):
            for name, wanted in (("plain", None), ("schema", grammar)):
                found[name].append(ms_per_token(engine, wanted, settings.rows, settings.tokens))
        masks = mask_ms(engine, grammar)
    plain, schema = (statistics.median(found[name]) for name in ("plain", "schema"))
    result = {"plain_ms": plain, "schema_ms": schema, "ratio": schema / plain}
    print(json.dumps(result | {"mask_ms": statistics.mean(masks), "slowest_mask_ms": max(masks)}))


if __name__ == "__main__":
    main()
