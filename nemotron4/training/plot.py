"""Curves of finished or running trainings, side by side in one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nemotron4.errors import DataError
from nemotron4.plots import Curve, draw_curves
from nemotron4.training.inputs import RECORD_FILE
from nemotron4.training.metrics import METRICS_FILE

UNINTERESTING = ("step", "kind", "seconds", "samples_seen", "tokens")


def read_metrics(run: Path) -> list[dict[str, float | str]]:
    path = run / METRICS_FILE if run.is_dir() else run
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", hint="give the run.directory") from error
    except ValueError as error:
        raise DataError(f"{path}: not a metrics file: {error}") from error


def plot(runs: Sequence[Path], output: Path) -> list[str]:
    """Draw every metric that a run has, one panel each, all runs in it; returns the metrics' names."""
    records = {run: read_metrics(run) for run in runs}
    names = dict.fromkeys(name for rows in records.values() for row in rows for name in row)
    shown = [name for name in names if name not in UNINTERESTING]
    if not shown:
        raise DataError(f"{runs[0]}: no step is recorded yet")
    has_own_names = len({run.name for run in runs}) == len(runs)
    panels: dict[str, list[Curve]] = {name: [] for name in shown}
    for name, curves in panels.items():
        for colour, (run, rows) in enumerate(records.items()):
            label = run.name if has_own_names else str(run)
            for kind in ("train", "validation"):
                points = [
                    (float(row["step"]), float(row[name]))
                    for row in rows
                    if row["kind"] == kind and name in row
                ]
                if points:
                    is_validation = kind == "validation"
                    suffix = " validation" if is_validation else ""
                    curves.append(Curve(label + suffix, points, colour, is_validation))
    draw_curves(panels, output, x_label="step", title=_settings(runs), largest="loss")
    return shown


def _settings(runs: Sequence[Path]) -> str:
    """What the run is, for the title; of several runs the legend tells them apart."""
    record = runs[0] / RECORD_FILE
    if len(runs) > 1 or not record.is_file():
        return ""
    recipe = json.loads(record.read_text(encoding="utf-8"))["recipe"]
    start = recipe["model"].get("start") or recipe["model"].get("preset")
    rate, size = recipe["optimizer"]["learning_rate"], recipe["batch"]["global_size"]
    return f"{recipe['stage']} of {start}: rate {rate:g}, {size} samples a step, seed {recipe['run']['seed']}"
