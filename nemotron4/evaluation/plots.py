"""The report's plots: MT-Bench as a radar, every other benchmark as bars next to the published values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemotron4.evaluation import published
from nemotron4.evaluation.report import Found, value_of
from nemotron4.plots import draw_bar_panels, draw_radar
from nemotron4.report import Bar, Bars

PUBLISHED = "published"
CARD = f"{published.CARD_MODEL} (card)"


def draw_all(found: Sequence[Found], out: Path) -> list[tuple[Path, str]]:
    """The plots that the results allow, with their captions."""
    drawn = []
    if any(one.result.task == "mt_bench" for one in found):
        drawn.append((_radar(found, out / "mt_bench.png"), "MT-Bench by category"))
    rows = [key for key in published.PEER_TABLE if any(_ours(found, key))]
    if rows:
        panels = [_panel(key, _ours(found, key)) for key in rows]
        path = draw_bar_panels(
            panels, out / "benchmarks.png", muted=[PUBLISHED], num_columns=min(2, len(rows))
        )
        drawn.append((path, "Benchmarks with 95 % intervals"))
    return drawn


def _ours(found: Sequence[Found], key: tuple[str, str, str]) -> list[Found]:
    task, metric, _ = key
    models = dict.fromkeys(one.model for one in found)
    return [one for model in models if (one := value_of(found, model, task, metric)) is not None]


def _radar(found: Sequence[Found], path: Path) -> Path:
    categories = published.MT_BENCH_COLUMNS[:8]
    series: dict[str, Sequence[float | None]] = {CARD: published.MT_BENCH_CARD[:8]}
    for one in found:
        if one.result.task == "mt_bench":
            metrics = one.result.metrics
            values = [metrics[name].value if name in metrics else None for name in categories]
            series[f"{one.model}, {one.result.name}"] = values
    return draw_radar(categories, series, path, title="MT-Bench by category, judge's rating of 10", limit=10)


def _panel(key: tuple[str, str, str], ours: Sequence[Found]) -> Bars:
    """Ours first, then every published value of this benchmark."""
    _, metric, label = key
    limit, form, unit = (10, ".2f", "rating of 10") if metric == "total" else (100, ".1f", "%")
    bars = []
    for one in ours:
        entry = one.result.metrics[metric]
        if entry.value is not None:
            span = entry.interval
            low, high = (None, None) if span is None else (span.lower, span.upper)
            text, name = f"{entry.value:{form}}", f"{one.model} {one.star}".rstrip()
            bars.append(Bar(name, entry.value, low, high, text, one.model))
    for peer, value in zip(published.PEERS, published.PEER_TABLE[key], strict=True):
        if value is not None:
            series = CARD if peer == published.CARD_MODEL else PUBLISHED
            bars.append(Bar(peer, value, label=f"{value:{form}}", series=series))
    return Bars(label, unit, bars, limit=limit)
