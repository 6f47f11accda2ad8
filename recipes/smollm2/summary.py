"""The last step of this recipe: every stage next to the others, as measured."""

from __future__ import annotations

import json
from pathlib import Path

from nemotron4.grading.statistics import wilson
from nemotron4.plots import draw_bars
from nemotron4.report import Bar, Bars, Folded, Table, as_markdown, percent, write_report

KINDS = ("code", "sum", "reading", "instruction")
STAGES = ("before", "sft", "contrast", "dpo", "rpo-1", "rpo-2", "rpo-3", "rpo-4", "grpo")
IFEVAL = {
    "prompt_strict": "IFEval: prompts, strict",
    "instruction_strict": "IFEval: instructions, strict",
    "looping": "IFEval: loops",
}
SHOWN = {"ends": ("all", "forms", "code"), "loops": ("all",), "holds": ("verse", *KINDS)}


def report(out: Path, run: Path, picture: Path | None) -> None:
    """A table of all stages, bars, and the answers to the first ten prompts, as they came."""
    out.mkdir(parents=True, exist_ok=True)
    columns = [(metric, group) for metric, groups in SHOWN.items() for group in groups]
    rows: list[list[str]] = []
    bars: list[Bar] = []
    texts: list[Folded] = []
    for name in STAGES:
        path = run / (name if name == "before" else f"measured-{name}") / "measured.json"
        if not path.is_file():  # piece by piece, not every stage was run
            continue
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
        found = _ifeval(run / f"ifeval-{name}" / "run" / "ifeval" / "result.json")
        rows[-1] += [f"{value:.1f} % [{lower:.1f}, {upper:.1f}]" for value, lower, upper in found]
        bars += [Bar(label, *each, series=name) for label, each in zip(IFEVAL.values(), found, strict=False)]
        answers = [(answer["prompt"], answer["text"]) for answer in measured["answers"][:10]]
        texts.append(Folded(f"{name}: answers to the first ten prompts", answers))
    names = [f"{metric}: {group}" for metric, group in columns]
    rows = [[*row, *[""] * (1 + len(names) + len(IFEVAL) - len(row))] for row in rows]
    table = Table(["stage", *names, *IFEVAL.values()], rows)
    shown = Bars("Held-out prompts and IFEval", "%", bars, limit=100.0)
    if picture is not None:
        draw_bars(shown, picture)
    blocks = [table, shown, *texts]
    write_report(out, "From a ChatML model to the card's format", blocks)
    print(as_markdown([table]))


def _ifeval(path: Path) -> list[tuple[float, float, float]]:
    """Each of ``IFEVAL`` with its interval; empty where it was not run."""
    if not path.is_file():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    ends = (result["intervals"][name] for name in IFEVAL)
    return [
        (result["metrics"][name], each["lower"], each["upper"])
        for name, each in zip(IFEVAL, ends, strict=True)
    ]
