"""One page of what a run of the recipe came to: python recipes/nano/report.py RUN OUT"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from nemotron4.plots import Curve, draw_curves
from nemotron4.report import Block, Folded, Heading, Picture, Table, percent, write_report
from nemotron4.runs import read_rows
from nemotron4.training.metrics import METRICS_FILE

STAGES = {"00-sft": "SFT", "02-dpo": "DPO", "03-rpo": "RPO"}
SHOWN = 10


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def draw_loss(run: Path, path: Path) -> None:
    """Both phases on one axis."""
    losses: dict[str, list[tuple[float, float]]] = {"train": [], "validation": []}
    before = 0
    for phase in ("pretrain", "continued"):
        rows = read_rows(run / phase / "train" / METRICS_FILE)
        for row in rows:
            losses[row["kind"]].append((before + row["step"], row["loss"]))
        before += rows[-1]["step"]
    curves = [
        Curve("training (smoothed)", losses["train"], 0),
        Curve("held out", losses["validation"], 1, is_dashed=True),
    ]
    draw_curves(
        {"loss, nats a token": curves}, path, x_label="steps of 4,096 tokens", largest="loss, nats a token"
    )


def text_table(measured: dict[str, Any]) -> Table:
    parts = [(name, part) for name, part in measured.items() if isinstance(part, dict)]
    rows = [[n, f"{p['tokens']:,}", f"{p['5-gram']:.3f}", f"{p['model']:.3f}"] for n, p in parts]
    return Table(["held out", "tokens", "5-gram, bits per byte", "nano, bits per byte"], rows)


def stage_table(run: Path) -> Table:
    rows = []
    for stage, name in STAGES.items():
        answers = read(run / f"answers-{stage}" / "measured.json")
        validation = [
            r for r in read_rows(run / "align" / "train" / stage / METRICS_FILE) if r["kind"] == "validation"
        ][-1]
        ranked = percent(validation["accuracy"]) if "accuracy" in validation else ""
        cells = [percent(answers["ends"]), percent(answers["sensible"]), str(answers["different"]), ranked]
        rows.append([name, *cells])
    person = percent(answers["person sensible"])
    rows.append(
        ["people's own answers", "", person, str(len({row["person"] for row in answers["rows"]})), ""]
    )
    return Table(["after", "ends", "sensible", "different answers", "held-out pairs ranked right"], rows)


def format_table(formats: dict[str, dict[str, Any]]) -> Table:
    rows = [
        [name, *(_said(result.get(key)) for key in ("tensors equal", "greedy tokens equal"))]
        for name, result in formats.items()
    ]
    return Table(["form", "tensors equal", "greedy tokens equal"], rows)


def _said(value: object) -> str:
    return (
        {True: "yes", False: "no", None: ""}.get(value, str(value)) if not isinstance(value, str) else value
    )


def answers(run: Path) -> list[tuple[str, str]]:
    rows = read(run / "answers-03-rpo" / "measured.json")["rows"][:SHOWN]
    return [(" / ".join(row["asked"]), row["answer"]) for row in rows]


def main(run: Path, out: Path) -> None:
    draw_loss(run, out / "loss.png")
    judged = read(run / "measured" / "rewards.json")
    counts = [str(judged[name]) for name in ("right", "wrong", "too long")]
    auc = f"{judged['auc']:.3f} [{judged['low']:.3f}, {judged['high']:.3f}]"
    spent = read(run / "manifest.json")["stages"]
    blocks: list[Block] = [
        Heading("A nano Nemotron-4"),
        text_table(read(run / "measured" / "text.json")),
        Picture("loss.png", "loss of both phases of pre-training"),
        Table(["reward model, held-out AUC, 95 %", "right turns", "wrong", "too long"], [[auc, *counts]]),
        stage_table(run),
        format_table(read(run / "formats" / "formats.json")),
        Table(["stage", "seconds"], [[name, f"{stage['seconds']:,.0f}"] for name, stage in spent.items()]),
        Folded("first answers after RPO, unselected", answers(run)),
    ]
    for path in write_report(out, "A nano Nemotron-4", blocks):
        print(path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
