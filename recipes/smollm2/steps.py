"""The steps of this recipe that are no command of the program: prompts, selection, pairs, measures.

Protocol of the second run, written on 30 November 2026, 08:33 UTC, when its first training had begun;
docs/results/smollm2.md has what came out of it and of the first (protocol: this file at 04362ee).

Why again: the first run missed its goal (IFEval's strict prompts 8 points over the start). Nine kinds of
instruction were not learned from 58 rows of each in 185 steps; a wish shows in one word of a long row.

- Prompts: poems 3 answers of the bare model in ChatML at temperature 0.8 and top_p 0.95, code 3, readings 2,
  other forms and 40 kinds of writing about 100 topics (writing_forms.txt) 1, long writing 2. Of each prompt
  the best by ``tasks.value`` is kept if it holds: verse names its subject, code passes its tests, readings
  have the answer. Texts other than code are first cut before they repeat four words or a line.
- Instructions (edits.py): 2,500 rows from those answers in words of ours (phrases.toml, twice as many as in
  the first run), three times as many of the nine kinds (``WEIGHTS``), 70 % with one instruction, and where no
  parts are asked for 70 % of at most three sentences. Ends and first words come from lists of ours. Long
  texts, and two to the same prompt as one, are asked for by words or sentences. No language but English.
- Sums: 320 worked answers by a program. Rows that share 13 words with a benchmark item (or 10 and half of
  it) are dropped. Rows are in the card's format; every twentieth follows another question and its answer.
- Stage sft: one epoch of 8 rows a step (418 steps), rank 8 on all layers, rate 2e-3 (before: 1e-3). Changed
  at 08:56, nothing measured: other work had the machine, so it stopped after 166 steps and went on to end at
  step 280, its cosine ending there too; at 09:15 that ended after step 204, half of the rows.
- Added at 09:19, after the measures of sft (73 of 144 in other words, the first run's end 64; small letters 1
  of 6, capitals 0, quotes 4): stage contrast (contrasts.py), 400 pairs without drawing, RPO from sft, rank 4,
  rate 2e-3. DPO and RPO of fresh pairs go on from it, as many as time allows; it may ship by the same rule.
- Changed at 10:14: contrast was stopped after 26 of 50 steps and not measured, so DPO starts from sft; then
  one round of RPO, as time allows. IFEval of what ships by the rule, and of the bare model, whole.
- Went on at 11:30 with both rounds of RPO, as written below. The card's question is asked as its client asks
  it, with its four end strings.
- DPO, then RPO twice, each of rank 1 (cut to rank 9), on the policy's own answers to 240 fresh prompts, two
  thirds of them instructions: the best and the worst of 4 by ``tasks.value``; where none follows and an edit
  of the best does, that edit and what it was made from. GRPO from sft with DPO's prompts if time is left. A
  reward model on human pairs is trained apart.
- Measured after each: ``held_out()``, 129 prompts (33 of the first adapter, 16 functions, 24 sums, 16
  readings, 40 instructions) as raw text, greedy, up to 256 tokens, an empty answer has not ended; after sft
  also 144 prompts of one instruction in words that no training has (``held_out_wishes``): these decide
  between trainings. Whole IFEval through `/generate` for what ships, and for others if time is left.
- Goals: IFEval's strict prompts 8 points over the start with intervals apart; loops under 5 %.
- The last stage of sft, dpo, rpo-1, rpo-2 ships of which holds: at least 95 % of the 129 end, less than 5 %
  loop, at most 2 of 16 code answers are empty, at least 13 of 40 instructions and 2 of 24 sums hold, and the
  answer to the card's question ends and names NVIDIA. IFEval does not choose.

Written on 30 November 2026, 17:58 UTC, before what it names had begun:

- Seed 1 of the whole recipe by its one command, SFT at its full 418 steps in one piece. Nothing of it
  ships in place of seed 0; it says how far another seed is away.
- From the kept SFT stage (seed 0): GRPO with DPO's 240 prompts, 15 rounds of 16 prompts by 4 answers,
  which is DPO's reward budget. From RPO-2: a third round of RPO (``--round 3``), to mend the loops on
  IFEval, goal 5 %. Both are measured as the stages above, and IFEval whole. RPO-3 ships if the rule above
  holds for it and fewer of its 129 answers loop than of RPO-2's, or as many, and as many or more of them
  hold.
- The reward model at its own 60 steps.
- Added at 19:00, after RPO-3 (IFEval 31.8 %, but 4 of the 129 and 10.7 % of IFEval loop): what loops there
  are greedy answers to instructions with parts, marks or placeholders; rounds draw at temperature 1, where
  few loop. RPO-4: from RPO-3, 400 prompts, 4 answers drawn and besides the greedy one, up to 300 tokens
  (``--greedy``). Measured as the others; it ships by the rule for RPO-3, compared with RPO-2.
- Added at 19:53, after RPO-4 (none of the 129 loops, 5.7 % of IFEval): RPO-5, the same from RPO-4, if time is
  left; by the same rule. Begun at 21:30 from the adapter that ships (RPO-4), on an AMD EPYC without AMX.
- Added at 21:20: seed 2 there, to rpo-2, as seed 1; both seeds go on to rpo-4 if time is left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tasks
from contrasts import contrasts
from edits import edited, held_out_wishes, mended, of_length, wishes
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
VERSE = ("verse", "rhyme")


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
    groups: dict[str, list[tuple[float, tasks.Task, str]]] = defaultdict(list)
    long: list[tuple[tasks.Task, str]] = []
    for row in read_rows(samples):
        task = row["meta"]["task"]
        text = cleaned(task["kind"], row.get("text", ""), is_whole=row.get("finish_reason") == "stop")
        if task["kind"] == "long":
            if LONG_WORDS[0] <= len(text.split()) <= LONG_WORDS[1]:
                long.append((task, text))
        elif text and len(text.split()) <= MAX_WORDS:
            groups[task["question"]].append((tasks.value(task, text), task, text))
    best = (max(found, key=lambda each: each[0]) for found in groups.values())
    kept = [(task, text) for reward, task, text in best if reward == 1.0]
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


def ask(out: Path, which: int, size: int, *, is_greedy: bool = False) -> None:
    """Prompts of a round in the card's format: a third of all kinds, the others new instructions."""
    draw = random.Random(100 + which)
    plain = tasks.tasks(max(1, size // 10))
    new = wishes(tasks.writings(size - size // 3, seed=2 + which), draw)
    chosen = draw.sample(plain, min(size // 3, len(plain))) + new
    draw.shuffle(chosen)
    drawn = {"n": PAIR_SAMPLES, "max_new_tokens": 160, "temperature": 1.0, "stop": [MARKER]}
    greedy = {"max_new_tokens": 300, "temperature": 0.0, "stop": [MARKER]}
    first = _asked(chosen, greedy) if is_greedy else ()  # the first of equally bad answers becomes the worst
    write_rows(out / "ask.jsonl", [*first, *_asked(chosen, drawn)])


def pair(out: Path) -> None:
    """Of the answers to each prompt the best and the worst, with their rewards, where these differ.

    Where no answer follows the instructions and an edit of the best does, the two are the pair.
    """
    groups: dict[str, list[tuple[float, str, bool]]] = defaultdict(list)
    asked: dict[str, tasks.Task] = {}
    for row in read_rows(out / "drawn.jsonl"):
        text, is_ended = row.get("text", "").strip(), row.get("finish_reason") == "stop"
        task = row["meta"]["task"]
        prompt = render([Message("user", task["question"])])
        asked[prompt] = task
        groups[prompt].append((tasks.value(task, text, is_ended=is_ended), text, is_ended))
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


def _reward(found: tuple[float, str, bool]) -> float:
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "step", choices=("prompts", "select", "contrast", "ask", "pair", "measure", "follow", "report")
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=16, help="topics to ask about; the rest grows with it")
    parser.add_argument("--run", type=Path, help="the folder of the recipe's run, for report")
    parser.add_argument("--picture", type=Path, help="where report draws its bars, with matplotlib")
    parser.add_argument("--samples", type=Path, help="the answers to select from")
    parser.add_argument("--round", type=int, default=0, help="which prompts to ask")
    parser.add_argument("--greedy", action="store_true", help="ask for the greedy answer too")
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
        ask(options.out, options.round, options.size, is_greedy=options.greedy)
    elif options.step == "pair":
        pair(options.out)
    elif options.step == "report":
        report(options.out, options.run, options.picture)
    elif options.step == "follow":
        measure(options.out, options.adapter, held_out_wishes(6)[: options.limit], by_kind)
    else:
        measure(options.out, options.adapter, held_out()[: options.limit], by_group)


if __name__ == "__main__":
    main()
