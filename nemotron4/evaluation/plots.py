"""The report's plots: MT-Bench as a radar, every other benchmark as bars beside the published values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nemotron4.evaluation import published
from nemotron4.evaluation.report import Found, value_of

PUBLISHED_COLOUR = "#b9c2b0"
CARD_COLOUR = "#5c8a00"
OUR_COLOURS = ("#1f4e9c", "#c2571a", "#7a3b8f", "#00796b")
COLUMNS = 3


def draw_all(found: Sequence[Found], out: Path) -> list[tuple[Path, str]]:
    """The plots that the results allow, with their captions."""
    drawn = []
    if any(one.result.task == "mt_bench" for one in found):
        drawn.append((_radar(found, out / "mt_bench.png"), "MT-Bench by category"))
    rows = [key for key in published.PEER_TABLE if any(_ours(found, key))]
    if rows:
        drawn.append((_bars(found, rows, out / "benchmarks.png"), "Benchmarks with 95 % intervals"))
    return drawn


def _models(found: Sequence[Found]) -> list[str]:
    return list(dict.fromkeys(one.model for one in found))


def _ours(found: Sequence[Found], key: tuple[str, str, str]) -> list[Found]:
    task, metric, _ = key
    return [one for model in _models(found) if (one := value_of(found, model, task, metric)) is not None]


def _radar(found: Sequence[Found], path: Path) -> Path:
    categories = published.MT_BENCH_COLUMNS[:8]
    angles = [2 * math.pi * at / len(categories) for at in range(len(categories))]
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)

    def draw(values: Sequence[float | None], label: str, colour: str) -> None:
        heights = [math.nan if value is None else value for value in values]
        axes.plot([*angles, angles[0]], [*heights, heights[0]], color=colour, label=label, marker="o", ms=3)
        axes.fill([*angles, angles[0]], [*heights, heights[0]], color=colour, alpha=0.08)

    draw(published.MT_BENCH_CARD[:8], f"{published.CARD_MODEL} (card)", CARD_COLOUR)
    ours = [one for one in found if one.result.task == "mt_bench"]
    for at, one in enumerate(ours):
        metrics = one.result.metrics
        values = [metrics[name].value if name in metrics else None for name in categories]
        draw(values, f"{one.model}, {one.result.name}", OUR_COLOURS[at % len(OUR_COLOURS)])
    axes.set_xticks(angles, categories)
    axes.set_ylim(0, 10)
    axes.set_yticks([2, 4, 6, 8, 10])
    axes.tick_params(axis="x", pad=14)
    axes.tick_params(axis="y", labelsize=8, colors="#666666")
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    figure.savefig(path, dpi=130)
    return path


def _bars(found: Sequence[Found], rows: Sequence[tuple[str, str, str]], path: Path) -> Path:
    num_columns = min(COLUMNS, len(rows))
    num_rows = math.ceil(len(rows) / num_columns)
    figure = Figure(figsize=(4.6 * num_columns, 3.1 * num_rows), layout="constrained")
    grid: Any = figure.subplots(num_rows, num_columns, squeeze=False)
    for at, key in enumerate(rows):
        _panel(grid[at // num_columns][at % num_columns], key, _ours(found, key), _models(found))
    for at in range(len(rows), num_rows * num_columns):
        grid[at // num_columns][at % num_columns].set_axis_off()
    figure.savefig(path, dpi=110)
    return path


def _panel(axes: Any, key: tuple[str, str, str], ours: Sequence[Found], models: Sequence[str]) -> None:
    """Horizontal bars: ours first, then every published value of this benchmark."""
    _, metric, label = key
    names, values, colours, errors = [], [], [], []
    for one in ours:
        entry = one.result.metrics[metric]
        if entry.value is None:
            continue
        names.append(f"{one.model} {one.star}".rstrip())
        values.append(entry.value)
        colours.append(OUR_COLOURS[models.index(one.model) % len(OUR_COLOURS)])
        interval = entry.interval
        errors.append(
            (0.0, 0.0)
            if interval is None
            else (max(0.0, entry.value - interval.lower), max(0.0, interval.upper - entry.value))
        )
    for peer, value in zip(published.PEERS, published.PEER_TABLE[key], strict=True):
        if value is not None:
            names.append(peer)
            values.append(value)
            colours.append(CARD_COLOUR if peer == published.CARD_MODEL else PUBLISHED_COLOUR)
            errors.append((0.0, 0.0))
    positions = list(range(len(names)))[::-1]
    axes.barh(positions, values, color=colours, height=0.72 * min(1.0, len(names) / 7))
    limit, form = (10, ".2f") if metric == "total" else (100, ".1f")
    for position, value, (below, above) in zip(positions, values, errors, strict=True):
        if below or above:
            axes.errorbar(value, position, xerr=[[below], [above]], color="#222222", capsize=2, lw=1)
        axes.text(value + above + limit / 100, position, f"{value:{form}}", va="center", fontsize=8)
    axes.set_yticks(positions, names, fontsize=8)
    axes.set_xlim(0, limit * 1.12)
    axes.set_title(label, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
