"""Curves of finished or running trainings, side by side in one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron4.errors import ConfigError, DataError
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
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need the package matplotlib", hint="pip install matplotlib") from error
    records = {run: read_metrics(run) for run in runs}
    names = dict.fromkeys(name for rows in records.values() for row in rows for name in row)
    shown = [name for name in names if name not in UNINTERESTING]
    if not shown:
        raise DataError(f"{runs[0]}: no step is recorded yet")
    columns = min(3, len(shown))
    figure = Figure(figsize=(5 * columns, 3.2 * -(-len(shown) // columns)), layout="constrained")
    has_own_names = len({run.name for run in runs}) == len(runs)
    lines: dict[str, Any] = {}
    for place, name in enumerate(shown, start=1):
        axes = figure.add_subplot(-(-len(shown) // columns), columns, place)
        for colour, (run, rows) in enumerate(records.items()):
            for kind, style in (("train", "-"), ("validation", "o--")):
                points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and name in row]
                if points:
                    label = run.name if has_own_names else str(run)
                    label += " validation" if kind == "validation" else ""
                    (lines[label],) = axes.plot(
                        *zip(*points, strict=True), style, color=f"C{colour}", markersize=4
                    )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.ticklabel_format(axis="y", useOffset=False)
    # Above all panels: no panel need have every run.
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=columns, fontsize=8)
    figure.savefig(output, dpi=120)
    return shown
