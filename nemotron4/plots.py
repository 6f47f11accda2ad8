"""Pictures in one style: readable at 800 pixels, a title, units, colours that everybody can tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron4.errors import ConfigError, import_optional
from nemotron4.report import COLOURS, MUTED, Bars

WIDTH = 8.0  # inches
MARKERS = ("o", "s", "^", "D", "v", "P")  # a second sign with the colour
WORDS = {
    "grad_norm": "gradient norm",
    "kl": "KL divergence",
    "lr": "learning rate",
    "mfu": "model FLOPs utilisation",
    "memory_gb": "memory, GB",
    "tokens_per_s": "tokens per second",
    "seconds": "seconds",
}


def words(name: str) -> str:
    """A field's name as a reader says it."""
    return WORDS.get(name, name.replace("_", " "))


def new_figure(height: float) -> Any:
    """A figure in the style; ConfigError without matplotlib."""
    figures = import_optional("matplotlib.figure", "drawing plots")
    return figures.Figure(figsize=(WIDTH, height), layout="constrained")


def style(axes: Any, *, title: str, x_label: str = "", y_label: str = "") -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Any, handles: Mapping[str, Any]) -> None:
    """Outside of all axes, where it covers nothing; none for a single series without a name."""
    if [name for name in handles if name] and len(handles) > 1:
        columns = 1 if max(map(len, handles)) > 40 else 2 if max(map(len, handles)) > 20 else 4
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower left", ncols=columns, frameon=False,
            fontsize=9,
        )  # fmt: skip


def save(figure: Any, path: Path) -> Path:
    """Write the picture; the ending of the name is its form. The same data give the same bytes."""
    try:
        figure.savefig(path, dpi=160, metadata={"Software": None} if path.suffix == ".png" else None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be written: {error}", hint="use .png, .svg or .pdf") from error
    return path


def draw_bars(bars: Bars, path: Path) -> Path:
    return draw_bar_panels([bars], path)


def draw_bar_panels(
    panels: Sequence[Bars], path: Path, *, muted: Sequence[str] = (), num_columns: int = 1
) -> Path:
    """Horizontal bars with their intervals; series in ``muted`` are grey."""
    num_rows = math.ceil(len(panels) / num_columns)
    series = list(dict.fromkeys(name for bars in panels for name in bars.series))
    coloured = [name for name in series if name not in muted]
    colours = {
        name: MUTED if name in muted else COLOURS[coloured.index(name) % len(COLOURS)] for name in series
    }
    rows = [
        max(len(bars.bars) for bars in panels[at * num_columns :][:num_columns]) for at in range(num_rows)
    ]
    figure = new_figure(sum(1.1 + 0.3 * max(1, count) for count in rows) + 0.2 * len(series))
    grid = figure.subplots(num_rows, num_columns, squeeze=False, height_ratios=[1.1 + 0.3 * n for n in rows])
    handles: dict[str, Any] = {}
    for at in range(num_rows * num_columns):
        axes = grid[at // num_columns][at % num_columns]
        if at < len(panels):
            _bar_panel(axes, panels[at], colours, handles)
        else:
            axes.set_axis_off()
    legend(figure, handles)
    return save(figure, path)


def _bar_panel(axes: Any, bars: Bars, colours: Mapping[str, str], handles: dict[str, Any]) -> None:
    names = list(dict.fromkeys(bar.name for bar in bars.bars))
    is_grouped = len(bars.bars) > len(names)
    height = 0.8 / max(1, len({bar.series for bar in bars.bars}) if is_grouped else 1)
    drawn: dict[str, int] = dict.fromkeys(names, 0)
    for bar in bars.bars:
        num_of_name = sum(other.name == bar.name for other in bars.bars)
        at = names.index(bar.name) + (drawn[bar.name] - (num_of_name - 1) / 2) * height
        drawn[bar.name] += 1
        if bar.value is None:
            axes.text(bars.end / 100, at, bar.label or "none", va="center", fontsize=9, color="#666666")
            continue
        handle = axes.barh(at, bar.value, height=height * 0.9, color=colours[bar.series])
        handles.setdefault(bar.series, handle)
        end = bar.value
        if bar.lower is not None and bar.upper is not None:
            reach = [[max(0.0, bar.value - bar.lower)], [max(0.0, bar.upper - bar.value)]]
            axes.errorbar(bar.value, at, xerr=reach, color="#1c1c1c", capsize=2, lw=1)
            end = max(end, bar.upper)
        axes.text(end + bars.end / 100, at, bar.label, va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.set_xlim(0, bars.end * 1.2)  # room for the labels
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= bars.end * 1.0001])
    style(axes, title=bars.title, x_label=bars.unit)


def draw_histograms(
    series: Mapping[str, Sequence[float]], path: Path, *, title: str, x_label: str, y_label: str
) -> Path:
    figure = new_figure(3.6)
    axes = figure.subplots()
    colours = [COLOURS[at % len(COLOURS)] for at in range(len(series))]
    axes.hist(list(series.values()), bins=30, label=list(series), color=colours)
    style(axes, title=title, x_label=x_label, y_label=y_label)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)
    return save(figure, path)


@dataclass(frozen=True)
class Curve:
    """``colour`` is the number of the run; points without a line are measured now and then."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int
    is_dashed: bool = False


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a twentieth of the values, without the pull of its beginning."""
    keep = 1 - 2 / (len(values) / 20 + 1) if len(values) > 20 else 0.0
    total = weight = 0.0
    found = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def draw_curves(
    panels: Mapping[str, Sequence[Curve]], path: Path, *, x_label: str, title: str = "", largest: str = ""
) -> Path:
    """One panel for each name, two in a row; ``largest`` is over both columns, with smoothed lines."""
    rest = [name for name in panels if name != largest]
    is_led = len(rest) < len(panels)
    num_columns = min(2, max(1, len(rest)))
    num_rows = math.ceil(len(rest) / num_columns)
    figure = new_figure(2.7 * num_rows + 4.2 * is_led + 0.4)
    heights = [*[1.6] * is_led, *[1.0] * num_rows]
    grid = figure.add_gridspec(len(heights), num_columns, height_ratios=heights)
    handles: dict[str, Any] = {curve.label: None for curves in panels.values() for curve in curves}
    for at, name in enumerate([*[largest] * is_led, *rest]):
        row, column = divmod(at - is_led, num_columns)
        axes = figure.add_subplot(grid[0, :] if is_led and at == 0 else grid[row + is_led, column])
        for curve in panels[name]:
            handles[curve.label] = _draw_curve(axes, curve, is_smooth=is_led and at == 0)
        style(axes, title=words(name), x_label=x_label)
        axes.ticklabel_format(axis="y", useOffset=False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    legend(figure, handles)
    return save(figure, path)


def _draw_curve(axes: Any, curve: Curve, *, is_smooth: bool) -> Any:
    colour, marker = COLOURS[curve.colour % len(COLOURS)], MARKERS[curve.colour % len(MARKERS)]
    is_short = curve.is_dashed or len(curve.points) < 20
    xs, ys = zip(*curve.points, strict=True)
    if is_smooth and not is_short:
        axes.plot(xs, ys, color=colour, lw=0.8, alpha=0.3)
        ys = tuple(smoothed(ys))
    [line] = axes.plot(
        xs, ys, color=colour, ls="--" if curve.is_dashed else "-", lw=1.5,
        marker=marker if is_short else None, markersize=4,
    )  # fmt: skip
    return line


def draw_stacks(
    names: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    path: Path,
    *,
    title: str,
    unit: str,
    limits: Mapping[str, float],
) -> Path:
    """Horizontal bars made of parts, and limits as vertical lines."""
    figure = new_figure(1.8 + 0.4 * len(names))
    axes = figure.subplots()
    left = [0.0] * len(names)
    handles: dict[str, Any] = {}
    for at, (part, sizes) in enumerate(parts.items()):
        handles[words(part)] = axes.barh(names, sizes, left=left, color=COLOURS[at % len(COLOURS)])
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for at, (name, limit) in enumerate(limits.items()):
        handles[name] = axes.axvline(limit, color="#1c1c1c", ls=("-", "--")[at % 2])
    axes.invert_yaxis()
    style(axes, title=title, x_label=unit)
    legend(figure, handles)
    return save(figure, path)


def draw_radar(
    categories: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    path: Path,
    *,
    title: str,
    limit: float,
) -> Path:
    """One closed line for each series; a value that is missing leaves a gap."""
    angles = [2 * math.pi * at / len(categories) for at in range(len(categories))]
    figure = new_figure(7.0)
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    handles: dict[str, Any] = {}
    for at, (name, values) in enumerate(series.items()):
        heights = [math.nan if value is None else value for value in values]
        around, closed = [*angles, angles[0]], [*heights, heights[0]]
        colour, marker = COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]
        (handles[name],) = axes.plot(around, closed, color=colour, marker=marker, ms=4)
        axes.fill(around, closed, color=colour, alpha=0.08)
    axes.set_xticks(angles, [words(name) for name in categories], fontsize=10)
    axes.set_ylim(0, limit)
    axes.tick_params(axis="x", pad=14)
    axes.tick_params(axis="y", labelsize=8, colors="#666666")
    axes.set_title(title, fontsize=11, loc="left", pad=24)
    legend(figure, handles)
    return save(figure, path)
