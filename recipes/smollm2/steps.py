"""The steps of this recipe that are no command of the program: prompts, selection, pairs, measures.

protocol.md says what was decided before each run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tasks
from contrasts import contrasts
from edits import FIRST_WORDS, LANGUAGE, edited, hard_wishes, held_out_wishes, mended, of_length, wishes
from summary import KINDS, report

import nemotron4
from nemotron4.evaluation.data import data_folder
from nemotron4.grading.repetition import is_looping
from nemotron4.grading.statistics import wilson
from nemotron4.records import Message
from nemotron4.runs import read_rows, write_file, write_json
from nemotron4.synth.filters import load_benchmarks
from nemotron4.text.prompt import render

MARKER = "<extra_id_1>"
# Samples of a prompt and their most tokens, by kind; "other" is the rest.
DRAWS = {
    "verse": (3, 100),
    "code": (3, 140),
    "reading": (2, 30),
    "long": (2, 320),
    "other": (1, 130),
}
PAIR_SAMPLES, MIN_GAP = 4, 0.25
MAX_WORDS, LONG_WORDS, EVERY, EDITED, CONTRASTS = 110, (100, 240), 20, 2500, 400
# Rounds of ``ask``: with greedy answers too; many parts, other languages; functions by their heads.
GREEDY, HARD, HEADS = range(4, 12), (6, *range(8, 12)), range(9, 12)
UNASKED_TOKENS = 460  # over data.max_length of the stage, so that no end is trained where a draw was cut
VERSE = ("verse", "rhyme")
Valued = tuple[float, tasks.Task, str]  # reward, what was asked, an answer
STEPS = (
    "prompts", "select", "contrast", "ask", "pair", "begin", "keep", "measure", "follow", "report",
)  # fmt: skip


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_prompts(out: Path, size: int) -> None:
    """For `generate`, in the model's own format."""
    asked = [task for task in tasks.tasks(size) if task["kind"] != "sum"]
    asked += tasks.writings(40 * size) + tasks.writings(7 * size, kind="long")
    rows = []
    for task in asked:
        number, most = DRAWS.get(task["kind"], DRAWS["other"])
        turns = [{"role": "user", "content": task["question"]}]
        settings = {"n": number, "max_new_tokens": most, "temperature": 0.8, "top_p": 0.95}
        rows.append({"messages": turns, "meta": {"task": task}, **settings})
    write_rows(out / "prompts.jsonl", rows)


def before_repetition(text: str, *, is_whole: bool, several: int = 4) -> str:
    """The text up to the end of the last line or sentence before it repeats several words or a line."""
    seen: set[tuple[str, ...]] = set()
    lines: set[str] = set()
    words = [(word[0].lower(), word.start()) for word in re.finditer(r"[\w']+", text)]
    end, is_cut = len(text), not is_whole
    for at in range(len(words) - several + 1):
        run = tuple(word for word, _ in words[at : at + several])
        if run in seen:
            end, is_cut = words[at][1], True
            break
        seen.add(run)
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


def cleaned(kind: str, text: str, *, is_whole: bool) -> str:
    if kind == "code":  # the program and what is before it
        head, fence, rest = text.partition("```")
        program, end, _ = rest.partition("\n```")
        return f"{head}{fence}{program}{end}".strip() if fence and end else ""
    several = 8 if kind == "long" else 4
    said = before_repetition(text, is_whole=is_whole, several=several).rstrip(",;")
    if kind == "verse" and not is_whole:  # up to the last line that ends a sentence, if that leaves a verse
        ends = [match.end() for match in re.finditer(r"[.!?](?=\n|$)", said)]
        whole = said[: ends[-1]] if ends else ""
        said = whole if whole.count("\n") >= 3 else said
    return said


def select(out: Path, samples: Path, size: int) -> None:
    """The best answer of each prompt, if it holds, edited ones, long ones and worked sums."""
    groups: dict[str, list[Valued]] = defaultdict(list)
    long: list[tuple[tasks.Task, str]] = []
    for row in read_rows(samples):
        task = row["meta"]["task"]
        text = cleaned(task["kind"], row.get("text", ""), is_whole=row.get("finish_reason") == "stop")
        if task["kind"] == "long":
            if LONG_WORDS[0] <= len(text.split()) <= LONG_WORDS[1]:
                long.append((task, text))
        elif text and len(text.split()) <= MAX_WORDS:
            groups[task["question"]].append((tasks.value(task, text), task, text))
    kept = best_of(groups.values())
    plain = [(task, text) for task, text in kept if task["kind"] == "prose" and not re.search(r"\d\.", text)]
    kept = [(task, text) for task, text in kept if task["question"] not in _writings(size)]
    kept += edited(plain, EDITED * size // 16)
    kept += [edit for each in (*long, *_joined(long)) if (edit := of_length(*each))]
    kept += [
        (task, tasks.worked(task["question"], task["check"]["answer"]))
        for task in tasks.sums(False, 20 * size)
    ]
    kept = without_benchmarks(kept)
    random.Random(3).shuffle(kept)
    write_rows(out / "sft.jsonl", _rows(kept))
    print(f"{len(kept)} rows of {len(groups)} prompts: {dict(Counter(task['kind'] for task, _ in kept))}")


def best_of(groups: Iterable[Sequence[Valued]], least: float = 1.0) -> list[tuple[tasks.Task, str]]:
    """The best answer of each group whose reward is ``least`` or more; 1: it holds.

    With less, one in another language than English, which the base does not write, need only end cleanly.
    """
    best = (max(found, key=_reward) for found in groups)
    needed = {LANGUAGE: tasks.CLEAN} if least < 1 else {}
    return [
        (task, text)
        for reward, task, text in best
        if reward >= needed.get(task["check"].get("ids", [""])[0], least)
    ]


def plain_answers(samples: Path) -> list[tuple[tasks.Task, str]]:
    """Prose that holds and has no numbers of items."""
    made = []
    for row in read_rows(samples):
        task = row["meta"]["task"]
        text = cleaned(task["kind"], row.get("text", ""), is_whole=row.get("finish_reason") == "stop")
        if task["kind"] == "prose" and not re.search(r"\d\.", text) and tasks.value(task, text) == 1.0:
            made.append((task, text))
    return made


def contrast(out: Path, samples: Path, size: int) -> None:
    """Pairs for a preference training without any drawing."""
    plain = without_benchmarks(plain_answers(samples))
    rows = []
    for asked, chosen, rejected in contrasts(plain, CONTRASTS * size // 16):
        prompt = render([Message("user", asked)])
        rows.append({
            "prompt": prompt, "chosen": f"{chosen}\n{MARKER}", "chosen_reward": 1.0,
            "rejected": f"{rejected}\n{MARKER}", "rejected_reward": 0.3,
        })  # fmt: skip
    random.Random(3).shuffle(rows)
    write_rows(out / "pairs.jsonl", rows)
    print(f"{len(rows)} pairs")


def _joined(long: Sequence[tuple[tasks.Task, str]]) -> Iterable[tuple[tasks.Task, str]]:
    """Two answers to one prompt as one, where the second does not say again what the first does."""
    for (task, first), (other, second) in itertools.pairwise(long):
        whole = f"{first}\n\n{second}"
        if (
            task["question"] == other["question"]
            and before_repetition(whole, is_whole=True, several=6) == whole
        ):
            yield task, whole


def _writings(size: int) -> set[str]:
    """Two of three of these are not rows themselves: they are short of words that instructions need."""
    return {task["question"] for number, task in enumerate(tasks.writings(40 * size)) if number % 3}


def _rows(kept: Sequence[tuple[tasks.Task, str]]) -> Iterable[dict[str, object]]:
    for number, (task, answer) in enumerate(kept):
        turns = [("user", task["question"]), ("assistant", answer)]
        if number % EVERY == 0:
            before, said = kept[(number * 7 + 1) % len(kept)]
            turns = [("user", before["question"]), ("assistant", said), *turns]
        yield {"messages": [{"role": role, "content": content} for role, content in turns]}


def _asked(chosen: Iterable[tasks.Task], settings: Mapping[str, object]) -> Iterable[dict[str, object]]:
    """Rows for `generate`, in the card's format as text."""
    for task in chosen:
        yield {"prompt": render([Message("user", task["question"])]), "meta": {"task": task}, **settings}


def without_benchmarks(kept: list[tuple[tasks.Task, str]]) -> list[tuple[tasks.Task, str]]:
    folder = data_folder()
    files = [path for path in sorted(folder.rglob("*.jsonl*")) if path.is_file()]
    if not files:
        print(f"no benchmark files in {folder}: the rows were not compared with any")
        return kept
    index = load_benchmarks(files)
    clean = [row for row in kept if not index.find(row[0]["question"]) and not index.find(row[1])]
    print(f"compared with {len(files)} benchmark files: {len(kept) - len(clean)} rows dropped")
    return clean


def held_out() -> list[tasks.Task]:
    return [
        *tasks.forms(True, 2), *tasks.programs(True), *tasks.sums(True, 24), *tasks.readings(True, 16),
        *tasks.constrained(4),
    ]  # fmt: skip


Measured = list[dict[str, Any]]


def measure(
    out: Path,
    adapter: str | None,
    chosen: Sequence[tasks.Task],
    grouped: Callable[[Sequence[tasks.Task], Measured], Mapping[str, Measured]],
) -> None:
    """How answers to held-out prompts in the card's format end, and how many hold."""
    asked = [render([Message("user", task["question"])]) for task in chosen]
    with nemotron4.load("smollm2", adapter=adapter) as engine:
        found = engine.generate(asked, max_new_tokens=256, temperature=0.0, stop=MARKER)
    rows = []
    for task, answer in zip(chosen, found, strict=True):
        is_ended = answer.finish_reason == "stop" and bool(answer.text.strip())
        rows.append({
            "kind": task["kind"], "prompt": task["question"], "text": answer.text, "ends": is_ended,
            "empty": not answer.text.strip(), "loops": is_looping(answer.text, answer.finish_reason),
            "holds": is_ended and tasks.holds(task, answer.text.strip()), "tokens": len(answer.token_ids),
        })  # fmt: skip
    table = {name: _shares(each) for name, each in grouped(chosen, rows).items() if each}
    write_json(out, {"adapter": adapter, "groups": table, "answers": rows})
    for name, each in table.items():
        print(name, json.dumps(each), flush=True)


def by_group(chosen: Sequence[tasks.Task], rows: Measured) -> Mapping[str, Measured]:
    first = [row for row in rows if row["kind"] not in KINDS]
    groups = {"forms": first, "verse": [row for row in first if row["kind"] in VERSE]}
    groups |= {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    return {"all": rows, **groups}


def by_kind(chosen: Sequence[tasks.Task], rows: Measured) -> Mapping[str, Measured]:
    """Of instructions."""
    groups: dict[str, Measured] = {"all": rows}
    for task, row in zip(chosen, rows, strict=True):
        groups.setdefault(task["check"]["ids"][0], []).append(row)
    return groups


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    made: dict[str, object] = {"prompts": len(rows), "tokens": sum(row["tokens"] for row in rows) / len(rows)}
    for name in ("ends", "empty", "loops", "holds"):
        count = sum(row[name] for row in rows)
        interval = wilson(count, len(rows))
        made[name] = [count, round(interval.lower, 3), round(interval.upper, 3)]
    return made


def ask(out: Path, which: int, size: int) -> None:
    """Prompts of a round in the card's format: a third of all kinds, the others new instructions."""
    draw = random.Random(100 + which)
    plain = tasks.tasks(max(1, size // 10))
    new = (hard_wishes if which in HARD else wishes)(tasks.writings(size - size // 3, seed=2 + which), draw)
    heads = tasks.programs(False, tasks.HEAD_FORMS)[:size] if which in HEADS else []
    chosen = draw.sample(plain, min(size // 3, len(plain))) + new + heads
    draw.shuffle(chosen)
    drawn = {"n": PAIR_SAMPLES, "max_new_tokens": 160, "temperature": 1.0, "stop": [MARKER]}
    greedy = {"max_new_tokens": 300, "temperature": 0.0, "stop": [MARKER]}
    first = _asked(chosen, greedy) if which in GREEDY else ()  # of equally bad answers the first is the worst
    write_rows(out / "ask.jsonl", [*first, *_asked(chosen, drawn)])


def begin(out: Path, size: int) -> None:
    """First words of texts that nobody asks for, ``size`` draws of each."""
    settings = {"n": size, "max_new_tokens": UNASKED_TOKENS, "temperature": 1.0}
    words = (word.capitalize() for word in FIRST_WORDS)
    write_rows(out / "begin.jsonl", ({"prompt": word, "meta": {"word": word}, **settings} for word in words))


def keep(out: Path, least: float) -> None:
    """Rows that keep what there is: the best answer of each prompt, if good enough, and unasked texts."""
    groups: dict[str, list[Valued]] = defaultdict(list)
    for task, reward, text, _ in _drawn(out):
        if text and len(text.split()) <= MAX_WORDS:
            groups[task["question"]].append((reward, task, text))
    kept = without_benchmarks(best_of(groups.values(), least))
    write_rows(out / "kept.jsonl", _rows(kept))
    unasked = [
        row["meta"]["word"] + row["text"] for row in read_rows(out / "unasked.jsonl") if row.get("text")
    ]
    write_rows(out / "texts.jsonl", ({"text": text} for text in unasked))
    print(f"{len(kept)} answers of {len(groups)} prompts, {len(unasked)} texts")


def pair(out: Path) -> None:
    """Of the answers to each prompt the best and the worst, with their rewards, where these differ.

    Where no answer follows the instructions and an edit of the best does, the two are the pair.
    """
    groups: dict[str, list[tuple[float, str, bool]]] = defaultdict(list)
    asked: dict[str, tasks.Task] = {}
    for task, reward, text, is_ended in _drawn(out):
        prompt = render([Message("user", task["question"])])
        asked[prompt] = task
        groups[prompt].append((reward, text, is_ended))
    rows, number = [], 0
    for prompt, found in groups.items():
        (good, chosen, is_whole), (bad, rejected, ends) = max(found, key=_reward), min(found, key=_reward)
        if good < 1.0 and is_whole and asked[prompt]["kind"] == "instruction":
            edit = mended(asked[prompt], chosen)
            if (reward := tasks.value(asked[prompt], edit)) == 1.0:
                (good, chosen), (bad, rejected, ends) = (reward, edit), (good, chosen, is_whole)
                number += 1
        if good - bad > MIN_GAP and rejected:
            rows.append({
                "prompt": prompt, "chosen": f"{chosen}\n{MARKER}", "chosen_reward": good,
                "rejected": f"{rejected}\n{MARKER}" if ends else rejected, "rejected_reward": bad,
            })  # fmt: skip
    write_rows(out / "pairs.jsonl", rows)
    rewards = [reward for found in groups.values() for reward, _, _ in found]
    mean = sum(rewards) / len(rewards)
    print(f"{len(rows)} pairs of {len(groups)} prompts, {number} by an edit; mean reward {mean:.3f}")


def _drawn(out: Path) -> Iterator[tuple[tasks.Task, float, str, bool]]:
    """Task, reward, text of each answer of a round, and whether it ended."""
    for row in read_rows(out / "drawn.jsonl"):
        task, text = row["meta"]["task"], row.get("text", "").strip()
        is_ended = row.get("finish_reason") == "stop"
        yield task, tasks.value(task, text, is_ended=is_ended), text, is_ended


def _reward(found: tuple[float, Any, Any]) -> float:
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=16, help="topics to ask about; the rest grows with it")
    parser.add_argument("--run", type=Path, help="the folder of the recipe's run, for report")
    parser.add_argument("--picture", type=Path, help="where report draws its bars, with matplotlib")
    parser.add_argument("--samples", type=Path, help="the answers to select from")
    parser.add_argument("--round", type=int, default=0, help="which prompts to ask, and how")
    parser.add_argument("--least", type=float, default=1.0, help="reward of an answer to keep; 1: it holds")
    parser.add_argument("--limit", type=int, help="held-out prompts, the first ones")
    parser.add_argument("--adapter", help="measure with it; the bare model if absent")
    options = parser.parse_args()
    if options.step == "prompts":
        write_prompts(options.out, options.size)
    elif options.step == "select":
        select(options.out, options.samples, options.size)
    elif options.step == "contrast":
        contrast(options.out, options.samples, options.size)
    elif options.step == "ask":
        ask(options.out, options.round, options.size)
    elif options.step == "pair":
        pair(options.out)
    elif options.step == "begin":
        begin(options.out, options.size)
    elif options.step == "keep":
        keep(options.out, options.least)
    elif options.step == "report":
        report(options.out, options.run, options.picture)
    elif options.step == "follow":
        measure(options.out, options.adapter, held_out_wishes(6)[: options.limit], by_kind)
    else:
        measure(options.out, options.adapter, held_out()[: options.limit], by_group)


if __name__ == "__main__":
    main()
