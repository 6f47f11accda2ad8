"""The page of a record: for each model a table of cells by peers, with the best peer's share; and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CELLS = {
    "one": "one stream, tokens/s",
    "prefill": "prompt of 1,024, tokens/s",
    "32": "32 sequences (128 + 128 new), tokens/s",
    "128": "128 sequences, tokens/s",
    "start": "start to first token, s",
    "long": "one stream at a context of 4,096, tokens/s",
    "shared": "64 prompts x 4 samples of 64 behind 1,000 shared, tokens/s",
}
MODELS = {"nano": "19 M", "small": "125 M", "base": "1.0 B", "demo": "demo model"}


def write(entries: Sequence[dict[str, Any]], path: Path, *, command: str) -> None:
    newest = {(e["model"], e["cell"], e["peer"], e["precision"]): e for e in entries if e["median"]}
    days = sorted({e["date"] for e in newest.values()})
    machines = sorted({e["processor"] for e in newest.values()})
    versions = sorted({e["version"] for e in newest.values()})
    loads = [e["load"] for e in newest.values()]
    lines = ["# Inference beside other engines", ""]
    lines += [f"`{command}`, {' to '.join(dict.fromkeys((days[0], days[-1])))}, {'; '.join(machines)}.", ""]
    lines += [
        f"{'; '.join(versions)}. Medians; load of the machine {min(loads):.1f} to {max(loads):.1f}.",
        "",
    ]
    if max(loads) > 2.5:
        lines += ["Other programs ran at the same time: compare columns of one table only.", ""]
    for model in dict.fromkeys(e["model"] for e in newest.values()):
        lines += _table(model, newest)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(newest, path.with_suffix(".png"))


def _table(model: str, newest: dict[tuple[str, str, str, str], dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys((k[2], k[3]) for k in newest if k[0] == model))
    lines = [f"## {model}", "", "| | " + " | ".join(" ".join(c) for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for cell, words in CELLS.items():
        found = [newest.get((model, cell, *column)) for column in columns]
        if any(found):
            shown = [f"{e['median']:.4g}" if e else "" for e in found]
            lines.append(f"| {words} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _plot(newest: dict[tuple[str, str, str, str], dict[str, Any]], path: Path) -> None:
    from nemotron4.plots import draw_bar_panels
    from nemotron4.report import Bar, Bars

    panels = []
    for model, cell in dict.fromkeys(k[:2] for k in newest):
        found = {k[2:]: e["median"] for k, e in newest.items() if k[:2] == (model, cell)}
        bars = tuple(
            Bar(name=precision, series=peer, value=value, label=f"{value:.4g}")
            for (peer, precision), value in found.items()
        )
        words = CELLS[cell].rpartition(", ")[0].partition(" (")[0]
        panels.append(
            Bars(f"{MODELS.get(model, model)}: {words}", "s" if cell == "start" else "tokens/s", bars)
        )
    draw_bar_panels(panels, path, num_columns=2)
