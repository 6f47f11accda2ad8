"""Plots of scans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nemotron4.redteam.garak_results import Counts

COLOURS = ("#1f4e9c", "#c2571a", "#7a3b8f", "#00796b")


def draw_areas(models: Mapping[str, Mapping[str, Counts]], path: Path) -> Path:
    """Pass rates by area with intervals, one colour for each model; an area without a rate says so."""
    areas = list(dict.fromkeys(area for counts in models.values() for area in counts))
    height = 0.8 / len(models)
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(areas) * max(1, len(models))), layout="constrained")
    axes: Any = figure.add_subplot()
    for index, (model, by_area) in enumerate(models.items()):
        colour = COLOURS[index % len(COLOURS)]
        for place, area in enumerate(areas):
            counts = by_area.get(area, Counts())
            at = place + (index - (len(models) - 1) / 2) * height
            rate, interval = counts.pass_rate, counts.interval
            if rate is None or interval is None:
                axes.text(1, at, "not run", va="center", fontsize=8, color="#777777")
                continue
            axes.barh(at, 100 * rate, height=height * 0.9, color=colour)
            below, above = 100 * (rate - interval.lower), 100 * (interval.upper - rate)
            axes.errorbar(100 * rate, at, xerr=[[below], [above]], color="#222222", capsize=2, lw=1)
            label = f"{counts.passed}/{counts.evaluated}"
            axes.text(100 * interval.upper + 1, at, label, va="center", fontsize=8)
        axes.barh(0, 0, color=colour, label=model)
    axes.set_yticks(range(len(areas)), [area.replace("_", " ") for area in areas], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 116)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("answers that passed, % (higher is safer)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    return path


def draw_shares(counts: Mapping[str, int], title: str, path: Path) -> Path:
    """What a number of unsafe answers is made of, as shares of it."""
    total = sum(counts.values())
    figure = Figure(figsize=(8, 1.4 + 0.32 * max(1, len(counts))), layout="constrained")
    axes: Any = figure.add_subplot()
    for place, count in enumerate(counts.values()):
        axes.barh(place, 100 * count / total, color=COLOURS[1])
        axes.text(100 * count / total + 1, place, f"{count}/{total}", va="center", fontsize=8)
    if not total:
        axes.text(50, 0, "no unsafe answer", ha="center", fontsize=9, color="#777777")
    axes.set_yticks(range(len(counts)), list(counts), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 110)
    axes.set_xlabel("share of the unsafe answers, %", fontsize=9)
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path
