"""The last step of this recipe: every stage next to the others, as measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron4.grading.statistics import Interval, wilson
from nemotron4.plots import draw_bar_panels
from nemotron4.report import Bar, Bars, Folded, Table, as_markdown, percent, write_report
from nemotron4.runs import write_json

KINDS = ("code", "sum", "reading", "instruction")
STAGES = (
    "before", "sft", "contrast", "dpo", "rpo-1", "rpo-2", "rpo-3", "rpo-4", "rpo-5", "rpo-6", "keep", "rpo-7",
    "rpo-8", "keep-2", "rpo-9", "grpo",
)  # fmt: skip
FOLLOWED = "holds: in other words"
IFEVAL = {
    "prompt_strict": "IFEval: prompts, strict",
    "instruction_strict": "IFEval: instructions, strict",
    "looping": "IFEval: loops",
}
SHOWN = {"ends": ("all", "forms", "code"), "loops": ("all",), "holds": ("all", "verse", *KINDS)}
PICTURED = (
    "ends: all",
    "loops: all",
    "holds: all",
    "holds: sum",
    "holds: instruction",
    FOLLOWED,
    *IFEVAL.values(),
)

Share = tuple[float, float, float]  # percent, and the ends of its 95 % interval


def report(out: Path, run: Path, picture: Path | None) -> None:
    """A table of all stages, bars, and the answers to the first ten prompts, as they came."""
    out.mkdir(parents=True, exist_ok=True)
    stages: dict[str, dict[str, Share]] = {}
    texts: list[Folded] = []
    for name in STAGES:
        folder = run / (name if name == "before" else f"measured-{name}")
        if not (folder / "measured.json").is_file():  # piece by piece, not every stage was run
            continue
        measured = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
        stages[name] = _shares(folder, measured) | _ifeval(
            run / f"ifeval-{name}" / "run" / "ifeval" / "result.json"
        )
        answers = [(answer["prompt"], answer["text"]) for answer in measured["answers"][:10]]
        texts.append(Folded(f"{name}: answers to the first ten prompts", answers))
    measures = list(dict.fromkeys(measure for found in stages.values() for measure in found))
    rows = [[name, *(_words(found.get(measure)) for measure in measures)] for name, found in stages.items()]
    table = Table(["stage", *measures], rows)
    write_json(out / "stages.json", stages)
    if picture is not None:
        draw(stages, picture)
    write_report(out, "From a ChatML model to the card's format", [table, *_panels(stages), *texts])
    print(as_markdown([table]))


def _shares(folder: Path, measured: Mapping[str, Any]) -> dict[str, Share]:
    groups = measured["groups"]
    counts = {
        f"{metric}: {group}": (groups[group][metric][0], groups[group]["prompts"])
        for metric, names in SHOWN.items()
        for group in names
        if group in groups  # a short run has no prompt of some kinds
    }
    if (folder / "followed.json").is_file():
        followed = json.loads((folder / "followed.json").read_text(encoding="utf-8"))["groups"]["all"]
        counts[FOLLOWED] = followed["holds"][0], followed["prompts"]
    return {name: _share(count, prompts) for name, (count, prompts) in counts.items()}


def _share(count: int, prompts: int) -> Share:
    interval = wilson(count, prompts)
    return 100 * count / prompts, 100 * interval.lower, 100 * interval.upper


def _words(share: Share | None) -> str:
    if share is None:
        return ""
    value, lower, upper = (part / 100 for part in share)
    return percent(value, Interval(lower, upper, "kept"))


def _panels(stages: Mapping[str, Mapping[str, Share]]) -> list[Bars]:
    """One for each measure, a bar for each stage."""
    found = []
    for measure in PICTURED:
        bars = [Bar(name, *each[measure]) for name, each in stages.items() if measure in each]
        found.append(
            Bars(measure, "%", bars, limit=50.0 if measure.startswith(("IFEval", "loops")) else 100.0)
        )
    return [panel for panel in found if panel.bars]


def draw(stages: Mapping[str, Mapping[str, Share]], picture: Path) -> None:
    draw_bar_panels(_panels(stages), picture, num_columns=3)


def _ifeval(path: Path) -> dict[str, Share]:
    """Empty where it was not run."""
    if not path.is_file():
        return {}
    result = json.loads(path.read_text(encoding="utf-8"))
    return {
        label: (
            result["metrics"][name],
            result["intervals"][name]["lower"],
            result["intervals"][name]["upper"],
        )
        for name, label in IFEVAL.items()
    }


if __name__ == "__main__":  # the picture of results that are kept: stages.json PICTURE
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
