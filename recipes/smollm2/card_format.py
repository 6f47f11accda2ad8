"""Teach the demo model the card's prompt format: its own answers, cut before they repeat, and a LoRA.

    nemotron4 recipe run recipes/smollm2 --out runs/card-format  # recipe.toml has the stages
    nemotron4 recipe run recipes/smollm2 --out runs/quick --preset minutes

The protocol, written before the training that ships:

- Prompts: forms with topics (card_topics.txt), and questions that the demo model writes itself from the
  opening of a user's turn (Magpie, Xu et al. 2024). Forms with a topic that is held out there are measured on
  and never trained on, and so is the card's own question.
- Data: the demo model answers each prompt once, greedily, in its own ChatML format; poems are drawn once
  more at temperature 0.8, three times in the style of Shakespeare. More than half of the greedy answers
  repeat themselves up to the limit. Each is cut after the last line or sentence before its first repetition
  (of four words, or of a line); what then fits its form and has at most 80 words is kept, in the card's
  format: all verse, all answers to own questions, the first 8 of other forms. Every sixth follows another
  question and its answer as a second turn, and every sixth is there a second time in the model's own format.
- Training: card_format.toml, last step, one seed.
- Added when that adapter still repeated verse (see docs/results/smollm2.md): it answers 110 of the poem
  prompts greedily; what stands before the first repetition, of two lines or more, is its target in a second,
  short training, with 30, 100 and 30 rows (verse, others, own format) of the first.
- Measured on every held-out prompt as raw text for `/generate`, greedy and sampled (temperature 1, top_p
  0.95, seed 1), up to 256 tokens: the share of answers that end by the card's marker, and the share that
  loop, with 95 % Wilson intervals; the same, greedy, in the model's own format, to see what changed there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import nemotron4
from nemotron4.grading.repetition import is_looping
from nemotron4.grading.statistics import wilson
from nemotron4.records import Message
from nemotron4.runs import read_rows, write_file, write_json
from nemotron4.text.prompt import CARD_QUESTION, render

Check = Callable[[str], bool]
MARKER = "<extra_id_1>"
MIN_WORDS, MAX_WORDS, MAX_OF_FORM, OTHER_FORM_EVERY = 8, 80, 8, 6
OPENING = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
MAX_QUESTION_WORDS = 40
DRAWN = {"temperature": 0.8, "top_p": 0.95}
WAYS = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 1.0, "top_p": 0.95}}


def _lines(least: int, most: int, words: int = 16) -> Check:
    """So many lines of verse, none of which is long or begins with a mark."""

    def check(text: str) -> bool:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return least <= len(lines) <= most and all(
            line[0].isalnum() and len(line.split()) <= words for line in lines
        )

    return check


def _items(number: int) -> Check:
    return lambda text: len(re.findall(r"^\s*(?:\d+\.|[-*])\s+\S", text, re.M)) == number


def _any(text: str) -> bool:
    return len(text.split()) >= MIN_WORDS


FORMS: dict[str, Check] = {
    "Write a short poem about {}.": _lines(4, 16),
    "Write a poem on {} in the style of Shakespeare.": _lines(4, 20),
    "Write a four-line rhyme about {}.": _lines(4, 4),
    "Explain {} to a child in three sentences.": _any,
    "Explain {} in one short paragraph.": _lines(1, 1, 100),
    "What is interesting about {}?": _any,
    "Give me three facts about {}.": _items(3),
    "Give me five tips about {}.": _items(5),
    "List four words that go with {}.": _items(4),
    "Write two sentences about {}.": _any,
    "Write a short e-mail to a friend about {}.": lambda text: "Dear" in text or "Hi" in text,
    "Tell a very short story about {}.": _any,
    "Why do people care about {}?": _any,
    "Describe {} without using its name.": _any,
    "What should a beginner know about {}?": _any,
    "Ask me three questions about {}.": lambda text: text.count("?") == 3,
}
TOPICS, HELD_OUT = (
    part.strip().splitlines()
    for part in Path(__file__).with_name("card_topics.txt").read_text().split("# held out")
)


def prompts(topics: Sequence[str]) -> list[str]:
    return [form.format(topic) for topic, form in itertools.product(topics, FORMS)]


FORM_OF = dict(zip(prompts(TOPICS), itertools.cycle(FORMS), strict=False))


def write_openings(out: Path, limit: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    row = {"prompt": OPENING, "max_new_tokens": 64, **DRAWN}
    write_rows(out / "openings.jsonl", [row] * limit)


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    write_file(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_prompts(out: Path, limit: int) -> None:
    """In the form that `nemotron4 generate` reads: drawn poems, own questions, forms with `limit` topics."""
    fixed = prompts(TOPICS[:limit])
    written = {row["text"].strip(): row for row in read_rows(out / "questions.jsonl")}
    own = [
        question
        for question, row in written.items()
        if row["finish_reason"] == "stop" and 4 <= len(question.split()) <= MAX_QUESTION_WORDS
    ]
    poems = [question for question in fixed if "poem" in question or "rhyme" in question]
    poems += [question for question in fixed if "Shakespeare" in question] * 2
    greedy = {"temperature": 0.0}
    asked = [(q, DRAWN) for q in poems] + [(q, greedy) for q in [*own, *fixed]]
    write_rows(
        out / "prompts.jsonl",
        (
            {
                "messages": [{"role": "user", "content": question}],
                "meta": {"question": question},
                "max_new_tokens": 120 if settings is DRAWN else 220,
                **settings,
            }
            for question, settings in asked
        ),
    )


def before_repetition(text: str, *, is_whole: bool) -> str:
    """The text up to the end of the last line or sentence before it repeats four words or a line."""
    seen: set[tuple[str, ...]] = set()
    lines: set[str] = set()
    words: list[tuple[str, int]] = [(w[0].lower(), w.start()) for w in re.finditer(r"[\w']+", text)]
    end, is_cut = len(text), not is_whole
    for at in range(len(words) - 3):
        four = tuple(word for word, _ in words[at : at + 4])
        if four in seen:
            end, is_cut = words[at][1], True
            break
        seen.add(four)
    place = 0
    for line in text[:end].splitlines(keepends=True):
        bare = line.strip().lower()
        if bare and bare in lines:
            end, is_cut = place, True
            break
        lines.add(bare)
        place += len(line)
    if not is_cut:
        return text.strip()
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]*(?=\s)|\n", text[:end])]
    whole = text[: ends[-1]] if ends else ""
    return re.sub(r"\n\s*(?:\d+\.|[-*]|[^\n]*:)\s*$", "", whole).strip()  # the mark of an item that is gone


def select(out: Path) -> None:
    """The good answers, in the card's format."""
    samples = [row for row in read_rows(out / "samples.jsonl") if "text" in row]
    kept: list[tuple[str, str]] = []
    taken: Counter[str] = Counter()
    for row in samples:
        question = row["meta"]["question"]
        form = FORM_OF.get(question, "")
        check = FORMS.get(form, _any)
        answer = before_repetition(row["text"], is_whole=row["finish_reason"] == "stop").rstrip(",;")
        is_full = taken[form] >= MAX_OF_FORM and bool(form) and not re.search("poem|rhyme", form)
        if 4 <= len(answer.split()) <= MAX_WORDS and check(answer) and not is_full:
            taken[form] += 1
            kept.append((question, answer))
    rows: list[dict[str, object]] = []
    for number, (question, answer) in enumerate(kept):
        turns = [Message("user", question)]
        if number % OTHER_FORM_EVERY == 0:
            before = kept[(number * 7 + 1) % len(kept)]
            turns = [Message("user", before[0]), Message("assistant", before[1]), *turns]
        rows.append({"prompt": render(turns), "completion": f"{answer}\n{MARKER}"})
        if number % OTHER_FORM_EVERY == 1:
            own = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": own})
    write_rows(out / "sft.jsonl", rows)
    print(f"{len(kept)} answers of {len(samples)} kept, {len(rows)} rows")


def write_verse(out: Path, limit: int) -> None:
    """Poem prompts for the adapter to answer in the card's format."""
    out.mkdir(parents=True, exist_ok=True)
    poems = [question for question in FORM_OF if "poem" in question]
    random.Random(1).shuffle(poems)
    row = {"max_new_tokens": 90, "temperature": 0.0, "stop": [MARKER]}
    write_rows(
        out / "verse.jsonl",
        (
            {"prompt": render([Message("user", question)]), "meta": {"question": question}, **row}
            for question in poems[:limit]
        ),
    )


def mix(out: Path, first: Path) -> None:
    """What stands before the adapter's repetitions, with rows of the first training."""
    rows: list[dict[str, object]] = []
    for row in read_rows(out / "answers.jsonl"):
        answer = before_repetition(row["text"], is_whole=row["finish_reason"] == "stop").rstrip(",;")
        if sum(bool(line.strip()) for line in answer.splitlines()) >= 2 and len(answer.split()) >= 12:
            prompt = render([Message("user", row["meta"]["question"])])
            rows.append({"prompt": prompt, "completion": f"{answer}\n{MARKER}"})
    groups: dict[str, list[dict[str, object]]] = {"verse": [], "other": [], "own": []}
    for earlier in read_rows(first):
        is_verse = re.search("poem|rhyme", str(earlier.get("prompt")), re.IGNORECASE)
        groups["own" if "messages" in earlier else "verse" if is_verse else "other"].append(earlier)
    draw = random.Random(2)
    for name, number in (("verse", 30), ("other", 100), ("own", 30)):
        rows += draw.sample(groups[name], min(number, len(groups[name])))
    draw.shuffle(rows)
    write_rows(out / "sft.jsonl", rows)
    print(f"{len(rows)} rows")


def measure(out: Path, adapter: str | None, limit: int) -> None:
    """How answers to held-out prompts end, in the card's format and in the model's own."""
    questions = [CARD_QUESTION, *prompts(HELD_OUT[:limit])]
    turns = [[Message("user", question)] for question in questions]
    asked = {"card": [render(each) for each in turns], "own": turns}
    result: dict[str, object] = {"adapter": adapter, "prompts": len(questions)}
    with nemotron4.load("smollm2", adapter=adapter) as engine:
        for form, way in (("card", "greedy"), ("card", "sampled"), ("own", "greedy")):
            answers = engine.generate(asked[form], max_new_tokens=256, seed=1, stop=MARKER, **WAYS[way])
            result[f"{form}, {way}"] = {
                "ends": _share([a.finish_reason == "stop" and bool(a.text.strip()) for a in answers]),
                "loops": _share([is_looping(answer.text, answer.finish_reason) for answer in answers]),
                "tokens": sum(len(answer.token_ids) for answer in answers) / len(answers),
                "answers": [
                    {"prompt": question, "text": answer.text, "finish_reason": answer.finish_reason}
                    for question, answer in zip(questions, answers, strict=True)
                ],
            }
            shown = {name: value for name, value in result[f"{form}, {way}"].items() if name != "answers"}
            print(f"{form}, {way}: {shown}", flush=True)
    write_json(out / ("before.json" if adapter is None else "after.json"), result)


def _share(flags: Sequence[bool]) -> dict[str, float]:
    interval = wilson(sum(flags), len(flags))
    return {"share": sum(flags) / len(flags), "lower": interval.lower, "upper": interval.upper}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=("openings", "prompts", "select", "verse", "mix", "measure"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, help="openings to continue, or topics to ask about")
    parser.add_argument("--adapter", help="measure with it; the bare model if absent")
    parser.add_argument("--first", type=Path, help="rows of the first training, for mix")
    options = parser.parse_args()
    if options.step == "openings":
        write_openings(options.out, options.limit or 300)
    elif options.step == "prompts":
        write_prompts(options.out, options.limit or len(TOPICS))
    elif options.step == "select":
        select(options.out)
    elif options.step == "verse":
        write_verse(options.out, options.limit or 110)
    elif options.step == "mix":
        mix(options.out, options.first)
    else:
        measure(options.out, options.adapter, options.limit or len(HELD_OUT))


if __name__ == "__main__":
    main()
