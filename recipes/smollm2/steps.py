"""The steps of this recipe that are no command of the program: prompts, selection, pairs, measures.

The protocol, written before the runs (30 November 2026); what came out is in docs/results/smollm2.md.

Why: the first adapter answered code questions in the card's format with nothing, and the card's question
with verse about something else. The bare model takes a code question in that format for markup: it begins
with "<" (23 to 27 %), as in `<extra_id_2>User`, or says nothing. The first training had no code in it and
taught that "<" goes on as the marker.

- Data (stages answers, sft): the bare model answers the training prompts of tasks.py in its own ChatML
  format at temperature 0.8, top_p 0.95: verse, code and sums 4 times, instructions 3, others 2. Of each
  prompt the best by ``tasks.value`` is kept if it holds: verse names its subject, code passes its tests,
  sums and readings have the answer, instructions their checker's yes. Texts other than code are first cut
  before they repeat four words or a line. Answers to plain questions are also edited for 17 kinds of
  instruction (edits.py), 8 rows each, each checked. A prompt or answer that shares 13 words with a
  benchmark item (or 10 and half of it) is dropped where the benchmark files are there.
- Rows are in the card's format; every sixth follows another question and its answer; every sixth is there
  again in the model's own format. At most 60 sums. One epoch of 12 rows a step, rank 6 on all layers,
  last step, one seed.
- Added when that adapter wrote verse that loops and long prose (stage again): it answers 48 poem and 48 prose
  prompts greedily; what stands before the first repetition, prose of at most 50 words, and 80 short rows of
  the first training are a second, short one of rank 3.
- Measured on ``held_out()``: the 33 prompts of the first adapter (two held-out topics and the card's
  question), 16 functions, 24 sums, 16 readings, 40 instructions, as raw text for `/generate`, greedy, up
  to 256 tokens, as served. An empty answer has not ended.
- It ships if, greedy: on the 33 prompts no smaller share ends than with the first adapter (31 of 33) and
  no larger share loops (2 of 33); at most 2 of 16 code answers are empty; and the verse on the card's
  question names NVIDIA or, failing that, more of the held-out verse holds than before.
- The chain goes on from there: a reward model on human pairs; DPO, then two rounds of RPO, each of rank
  1, on fresh pairs of the policy's own answers, the best and the worst of 4 by ``tasks.value``; GRPO from
  the SFT stage with as many answers judged as the preference stages have together. Each is measured on
  ``held_out()`` and on the same seeded sample of IFEval.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tasks
from edits import EDITS, edited

import nemotron4
from nemotron4.evaluation.data import data_folder
from nemotron4.grading.repetition import is_looping
from nemotron4.grading.statistics import wilson
from nemotron4.records import Message
from nemotron4.report import Bar, Bars, Folded, Table, as_markdown, percent, write_report
from nemotron4.runs import read_rows, write_file, write_json
from nemotron4.synth.filters import load_benchmarks
from nemotron4.text.prompt import render

MARKER = "<extra_id_1>"
# Samples of a prompt and their most tokens, by kind; "other" is the rest.
DRAWS = {
    "verse": (4, 100),
    "code": (4, 140),
    "sum": (4, 60),
    "reading": (2, 30),
    "instruction": (3, 120),
    "other": (2, 130),
}
PAIR_SAMPLES, MIN_GAP = 4, 0.25
MAX_WORDS, MAX_SUMS, EVERY = 110, 60, 6
STAGES = ("before", "sft", "again", "dpo", "rpo-1", "rpo-2", "grpo")
VERSE = ("verse", "rhyme")
KINDS = ("code", "sum", "reading", "instruction")
SHOWN = {"ends": ("all", "forms", "code"), "loops": ("all",), "holds": ("verse", *KINDS)}


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_prompts(out: Path, size: int) -> None:
    """For `generate`, in the model's own format."""
    rows = []
    for task in tasks.tasks(size):
        number, most = DRAWS.get(task["kind"], DRAWS["other"])
        turns = [{"role": "user", "content": task["question"]}]
        settings = {"n": number, "max_new_tokens": most, "temperature": 0.8, "top_p": 0.95}
        rows.append({"messages": turns, "meta": {"task": task}, **settings})
    write_rows(out / "prompts.jsonl", rows)


def before_repetition(text: str, *, is_whole: bool) -> str:
    """The text up to the end of the last line or sentence before it repeats four words or a line."""
    seen: set[tuple[str, ...]] = set()
    lines: set[str] = set()
    words = [(word[0].lower(), word.start()) for word in re.finditer(r"[\w']+", text)]
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


def cleaned(kind: str, text: str, *, is_whole: bool) -> str:
    if kind == "code":  # the program and what stands before it
        head, fence, rest = text.partition("```")
        program, end, _ = rest.partition("\n```")
        return f"{head}{fence}{program}{end}".strip() if fence and end else ""
    said = before_repetition(text, is_whole=is_whole).rstrip(",;")
    if kind == "verse" and not is_whole:  # up to the last line that ends a sentence, if that leaves a verse
        ends = [match.end() for match in re.finditer(r"[.!?](?=\n|$)", said)]
        whole = said[: ends[-1]] if ends else ""
        said = whole if whole.count("\n") >= 3 else said
    return said


def select(out: Path, samples: Path, size: int) -> None:
    """The best answer of each prompt, if it holds, and edited ones; in the card's format."""
    groups: dict[str, list[tuple[float, tasks.Task, str]]] = defaultdict(list)
    for row in read_rows(samples):
        task = row["meta"]["task"]
        text = cleaned(task["kind"], row.get("text", ""), is_whole=row.get("finish_reason") == "stop")
        if text and len(text.split()) <= MAX_WORDS:
            groups[task["question"]].append((tasks.value(task, text), task, text))
    kept: list[tuple[tasks.Task, str]] = []
    taken: Counter[str] = Counter()
    for found in groups.values():
        best, task, text = max(found, key=lambda each: each[0])
        if best == 1.0 and (task["kind"] != "sum" or taken["sum"] < MAX_SUMS):
            taken[task["kind"]] += 1
            kept.append((task, text))
    plain = [(task, text) for task, text in kept if task["kind"] == "prose" and not re.search(r"\d\.", text)]
    kept += edited(plain, max(1, size // 2))
    kept = without_benchmarks(kept)
    random.Random(3).shuffle(kept)
    write_rows(out / "sft.jsonl", _rows(kept))
    print(f"{len(kept)} answers kept of {len(groups)} prompts: {dict(taken)}, the others edited")


def _rows(kept: Sequence[tuple[tasks.Task, str]]) -> Iterable[dict[str, object]]:
    for number, (task, answer) in enumerate(kept):
        turns = [Message("user", task["question"])]
        if number % EVERY == 0:
            before, said = kept[(number * 7 + 1) % len(kept)]
            turns = [Message("user", before["question"]), Message("assistant", said), *turns]
        yield {"prompt": render(turns), "completion": f"{answer}\n{MARKER}"}
        if number % EVERY == 1:
            own = [("user", task["question"]), ("assistant", answer)]
            yield {"messages": [{"role": role, "content": content} for role, content in own]}


def again(out: Path, size: int) -> None:
    """Poems and prose for the adapter to write in the card's format, greedily, as it will be asked."""
    draw = random.Random(6)
    forms = tasks.forms(False, size)
    groups = [[task for task in forms if task["kind"] in kinds] for kinds in (VERSE, ("prose",))]
    chosen = [task for group in groups for task in draw.sample(group, min(3 * size, len(group)))]
    settings = {"max_new_tokens": 100, "temperature": 0.0, "stop": [MARKER]}
    prompts = [render([Message("user", task["question"])]) for task in chosen]
    asked = zip(prompts, chosen, strict=True)
    write_rows(out / "ask.jsonl", ({"prompt": p, "meta": {"task": t}, **settings} for p, t in asked))


def mix(out: Path, first: Path, size: int) -> None:
    """What stands before its repetitions, prose of at most 50 words, and short rows of the first training."""
    rows: list[dict[str, object]] = []
    for row in read_rows(out / "drawn.jsonl"):
        task = row["meta"]["task"]
        answer = before_repetition(row["text"], is_whole=row["finish_reason"] == "stop").rstrip(",;")
        if task["kind"] in VERSE:
            answer = "\n".join(answer.splitlines()[:12]).strip()
            is_good = answer.count("\n") >= 1 and len(answer.split()) >= 12
        else:
            said = ""
            for sentence in re.findall(r"[^.!?]+[.!?]+", answer):
                if len(f"{said}{sentence}".split()) > 50:
                    break
                said += sentence
            answer, is_good = said.strip(), len(said.split()) >= 8
        if is_good:
            prompt = render([Message("user", task["question"])])
            rows.append({"prompt": prompt, "completion": f"{answer}\n{MARKER}"})
    earlier = [row for row in read_rows(first) if len(str(row.get("completion", "")).split()) <= 60]
    draw = random.Random(2)
    rows += draw.sample(earlier, min(5 * size, len(earlier)))
    draw.shuffle(rows)
    write_rows(out / "sft.jsonl", rows)
    print(f"{len(rows)} rows")


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
        *tasks.constrained(True, 4),
    ]  # fmt: skip


def measure(out: Path, adapter: str | None, limit: int | None) -> None:
    """How answers to held-out prompts in the card's format end, and how many hold."""
    chosen = held_out()[:limit]
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
    first = [row for row in rows if row["kind"] not in KINDS]
    groups = {"forms": first, "verse": [row for row in first if row["kind"] in VERSE]}
    groups |= {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    table = {name: _shares(each) for name, each in {"all": rows, **groups}.items() if each}
    write_json(out, {"adapter": adapter, "groups": table, "answers": rows})
    for name, each in table.items():
        print(name, json.dumps(each), flush=True)


def _shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    made: dict[str, object] = {"prompts": len(rows), "tokens": sum(row["tokens"] for row in rows) / len(rows)}
    for name in ("ends", "empty", "loops", "holds"):
        count = sum(row[name] for row in rows)
        interval = wilson(count, len(rows))
        made[name] = [count, round(interval.lower, 3), round(interval.upper, 3)]
    return made


def report(out: Path, run: Path) -> None:
    """A table of all stages, a picture, and the answers to the first ten prompts, as they came."""
    columns = [(metric, group) for metric, groups in SHOWN.items() for group in groups]
    rows: list[list[str]] = []
    bars: list[Bar] = []
    texts: list[Folded] = []
    for name in STAGES:
        path = run / (name if name == "before" else f"measured-{name}") / "measured.json"
        measured = json.loads(path.read_text(encoding="utf-8"))
        rows.append([name])
        for metric, group in columns:
            found = measured["groups"].get(group)
            if found is None:  # a short run has no prompt of this kind
                rows[-1].append("")
                continue
            share, interval = found[metric][0] / found["prompts"], wilson(found[metric][0], found["prompts"])
            rows[-1].append(percent(share, interval))
            ends = (100 * number for number in (share, interval.lower, interval.upper))
            bars.append(Bar(f"{metric}: {group}", *ends, series=name))
        rows[-1] += _ifeval(run / f"ifeval-{name}" / "run" / "ifeval" / "result.json")
        answers = [(answer["prompt"], answer["text"]) for answer in measured["answers"][:10]]
        texts.append(Folded(f"{name}: answers to the first ten prompts", answers))
    names = [f"{metric}: {group}" for metric, group in columns]
    table = Table(["stage", *names, "IFEval prompt, strict", "IFEval instruction, strict"], rows)
    blocks = [table, Bars("Held-out prompts", "%", bars, limit=100.0), *texts]
    write_report(out, "From a ChatML model to the card's format", blocks)
    print(as_markdown([table]))


def _ifeval(path: Path) -> list[str]:
    if not path.is_file():
        return ["", ""]
    result = json.loads(path.read_text(encoding="utf-8"))
    cells = []
    for metric in ("prompt_strict", "instruction_strict"):
        interval = result["intervals"][metric]
        cells.append(f"{result['metrics'][metric]:.1f} % [{interval['lower']:.1f}, {interval['upper']:.1f}]")
    return cells


def ask(out: Path, which: int, size: int) -> None:
    """Prompts of a round in the card's format: of all kinds, and instructions of every kind, newly drawn."""
    draw = random.Random(100 + which)
    plain = tasks.tasks(max(1, size // 10))
    new = tasks.constrained(False, 1 + size // 50, types=tuple(EDITS), seed=200 + which)
    chosen = draw.sample(plain, min(size - size // 3, len(plain))) + draw.sample(new, size // 3)
    draw.shuffle(chosen)
    settings = {"n": PAIR_SAMPLES, "max_new_tokens": 120, "temperature": 1.0, "stop": [MARKER]}
    write_rows(
        out / "ask.jsonl",
        (
            {
                "prompt": render([Message("user", task["question"])]),
                "meta": {"task": task},
                **settings,
            }
            for task in chosen
        ),
    )


def pair(out: Path) -> None:
    """Of the answers to each prompt the best and the worst, with their rewards, where these differ."""
    groups: dict[str, list[tuple[float, str, bool]]] = defaultdict(list)
    for row in read_rows(out / "drawn.jsonl"):
        text, is_ended = row.get("text", "").strip(), row.get("finish_reason") == "stop"
        reward = tasks.value(row["meta"]["task"], text, is_ended=is_ended)
        prompt = render([Message("user", row["meta"]["task"]["question"])])
        groups[prompt].append((reward, text, is_ended))
    rows = []
    for prompt, found in groups.items():
        (good, chosen, _), (bad, rejected, ends) = max(found, key=_reward), min(found, key=_reward)
        if good - bad > MIN_GAP and rejected:
            rows.append({
                "prompt": prompt, "chosen": f"{chosen}\n{MARKER}", "chosen_reward": good,
                "rejected": f"{rejected}\n{MARKER}" if ends else rejected, "rejected_reward": bad,
            })  # fmt: skip
    write_rows(out / "pairs.jsonl", rows)
    rewards = [reward for found in groups.values() for reward, _, _ in found]
    print(f"{len(rows)} pairs of {len(groups)} prompts, mean reward {sum(rewards) / len(rewards):.3f}")


def _reward(found: tuple[float, str, bool]) -> float:
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "step", choices=("prompts", "select", "again", "mix", "ask", "pair", "measure", "report")
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=16, help="topics to ask about; the rest grows with it")
    parser.add_argument("--run", type=Path, help="the folder of the recipe's run, for report")
    parser.add_argument("--samples", type=Path, help="the answers to select from")
    parser.add_argument("--round", type=int, default=0, help="which prompts to ask")
    parser.add_argument("--limit", type=int, help="held-out prompts, the first ones")
    parser.add_argument("--adapter", help="measure with it; the bare model if absent")
    options = parser.parse_args()
    if options.step == "prompts":
        write_prompts(options.out, options.size)
    elif options.step == "select":
        select(options.out, options.samples, options.size)
    elif options.step == "again":
        again(options.out, options.size)
    elif options.step == "mix":
        mix(options.out, options.samples, options.size)
    elif options.step == "ask":
        ask(options.out, options.round, options.size)
    elif options.step == "pair":
        pair(options.out)
    elif options.step == "report":
        report(options.out, options.run)
    else:
        measure(options.out, options.adapter, options.limit)


if __name__ == "__main__":
    main()
