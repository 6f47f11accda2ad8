"""The README.md of a trained model: what it started from, what it was trained on, and what it reached."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron4.model_card import EVALUATIONS, METHODS, CardContent, render
from nemotron4.report import Block, Heading, Table, Text

SHOWN = ("learning_rate", "global_size", "max_steps", "epochs", "schedule", "loss", "beta", "rank", "compute")
LATER = "not measured when the model was written; `nemotron4 card` fills it"


def model_card(record: Mapping[str, Any], metrics: Path, step: int) -> str:
    """From a run's record and its metrics, for the model after a step."""
    name = Path(record["recipe"]["run"]["directory"]).name
    evaluated = dict.fromkeys([task for _, _, task, _ in EVALUATIONS] + list(METHODS), LATER)
    sections = (
        "License",
        "Intended use",
        "Required Hardware",
        "Model Architecture",
        "Prompt Format",
        "Usage",
    )
    return render(
        CardContent(
            name=name,
            overview=[overview(record, step)],
            training=training_blocks(record, metrics, step),
            missing=evaluated | dict.fromkeys(sections, "`nemotron4 card` fills it"),
        )
    )


def overview(record: Mapping[str, Any], step: int) -> str:
    recipe: dict[str, Any] = record["recipe"]
    start = recipe["model"].get("start") or f"fresh weights of the shape {recipe['model'].get('preset')}"
    return f"Stage {recipe['stage']}, {step} of {record['num_steps']} steps, from {start}."


def training_blocks(record: Mapping[str, Any], metrics: Path, step: int) -> Sequence[Block]:
    """Data with hashes, settings, and the last numbers up to the step."""
    recipe: dict[str, Any] = record["recipe"]
    rows: dict[str, dict[str, Any]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        values = json.loads(line)
        if values["step"] <= step:
            rows[values["kind"]] = values
    settings = [
        (f"{table}.{name}", str(value))
        for table, entries in recipe.items()
        if isinstance(entries, dict)
        for name, value in entries.items()
        if name in SHOWN
    ]
    measured = [
        (f"{kind} {name.replace('_', ' ')}", f"{value:.5g}")
        for kind, values in rows.items()
        for name, value in values.items()
        if name not in ("step", "kind", "seconds", "mfu", "tokens_per_s", "memory_gb", "tokens")
    ]
    return [
        Heading("Data", 4),
        Text(f"{record['num_samples']:,} samples; {record['num_rows_left_out']:,} rows were left out."),
        Table(("file", "SHA-256"), [(name, str(known)[:16]) for name, known in record["inputs"].items()]),
        Heading("Settings", 4),
        Table(("setting", "value"), settings),
        Heading(f"Measured at step {step}", 4),
        Table(("number", "value"), measured),
        Text("Made with nemotron4 {nemotron4}, torch {torch}.".format(**record["versions"])),
    ]
