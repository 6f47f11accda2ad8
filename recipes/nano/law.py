"""Tables, fit and plot of what trials.py measured: python recipes/nano/law.py OUT

Reads OUT/trials.jsonl; writes OUT/trials.md and OUT/law.png. Missing trainings are named.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from trials import CHOICES, SIZES, UNSEEN, trials

from nemotron4.plots import new_figure, save, style
from nemotron4.report import COLOURS, Block, Heading, Table, Text, as_markdown
from nemotron4.runs import read_rows

Row = dict[str, Any]
# Parameters, training tokens, what was published: arXiv 2402.16819, 2406.11704 (no loss); GPT-3's bits per
# byte on the Pile are in arXiv 2101.00027, its size and tokens in arXiv 2005.14165.
FAMILY = {
    "Nemotron-4 15B": (15e9, 8e12, "loss not published; MMLU 64.2"),
    "Nemotron-4 340B": (340e9, 9e12, "loss not published; MMLU 81.1"),
    "GPT-3 175B, on the Pile": (175e9, 300e9, "0.718 bits per byte"),
}
EXPONENTS = np.arange(0.02, 1.21, 0.01)


@dataclass(frozen=True)
class Law:
    """L = floor + a / N^alpha + b / D^beta, bits per byte; ``error`` is the root mean square of the fit."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    error: float

    def at(self, parameters: float, tokens: float) -> float:
        return float(self.floor + self.a / parameters**self.alpha + self.b / tokens**self.beta)


def fit(rows: Sequence[Row]) -> Law:
    """Least squares: exponents on a grid, the rest linear and not negative."""
    n, d, bits = (
        np.array([row[name] for row in rows], dtype=float) for name in ("multiplied", "tokens", "bits")
    )
    best: Law | None = None
    for alpha, beta in product(EXPONENTS, EXPONENTS):
        columns = [np.ones_like(n), n**-alpha, d**-beta]
        for used in ((0, 1, 2), (1, 2), (0, 1), (0, 2)):
            matrix = np.stack([columns[i] for i in used], axis=1)
            scale = matrix.max(axis=0)
            found, *_ = np.linalg.lstsq(matrix / scale, bits, rcond=None)
            if (found < 0).any():
                continue
            error = float(np.sqrt(np.mean((matrix / scale @ found - bits) ** 2)))
            values = dict(zip(used, found / scale, strict=True))
            law = Law(values.get(0, 0.0), values.get(1, 0.0), alpha, values.get(2, 0.0), beta, error)
            if best is None or error < best.error - 1e-12:
                best = law
            break
    assert best is not None, "two terms without a floor always fit somehow"
    return best


def choices_table(rows: dict[str, Row]) -> Table:
    """Mean and spread over seeds, and the difference to the card's block seed by seed."""
    cells = []
    for choice in CHOICES:
        seeds = [
            seed for seed in range(3) if {f"choice {choice} {seed}", f"choice card {seed}"} <= rows.keys()
        ]
        bits = np.array([rows[f"choice {choice} {seed}"]["bits"] for seed in seeds])
        apart = bits - np.array([rows[f"choice card {seed}"]["bits"] for seed in seeds])
        if not len(bits):
            cells.append([choice, "0", "", "", ""])
            continue
        spread = f"{bits.std(ddof=1):.4f}" if len(bits) > 1 else ""
        listed = "" if choice == "card" else ", ".join(f"{value:+.4f}" for value in apart)
        cells.append([choice, str(len(bits)), f"{bits.mean():.4f}", spread, listed])
    columns = [
        "block",
        "seeds",
        "bits per byte, mean",
        "standard deviation",
        "minus the card's block, seed by seed",
    ]
    return Table(columns, cells)


def points_table(rows: Sequence[Row], law: Law | None) -> Table:
    cells = []
    for row in rows:
        kind = row["name"].split()[0]
        name = "held out" if row["parameters"] == UNSEEN.num_parameters else f"equal {kind}"
        fitted = "" if law is None else f"{law.at(row['multiplied'], row['tokens']):.4f}"
        sizes = [f"{row['parameters']:,}", f"{row['multiplied']:,}", f"{row['tokens']:,}"]
        cells.append([name, *sizes, f"{row['bits']:.4f}", fitted, f"{row['seconds']:.0f}"])
    columns = ["curve", "parameters", "N", "D, tokens", "bits per byte", "law", "processor seconds"]
    return Table(columns, cells)


def draw(rows: Sequence[Row], law: Law, path: Path) -> None:
    figure = new_figure(3.8)
    axes = figure.subplots(1, 2, sharey=True)
    for place, (kind, title) in enumerate((("tokens", "equal tokens"), ("compute", "equal compute, 6 N D"))):
        points = sorted(
            (row["multiplied"], row["bits"], row["tokens"])
            for row in rows
            if row["name"].startswith(kind) and row["parameters"] != UNSEEN.num_parameters
        )
        if not points:
            continue
        sizes = np.geomspace(points[0][0], points[-1][0], 50)
        fixed = points[0][2] if kind == "tokens" else points[0][0] * points[0][2]
        line = [law.at(n, fixed if kind == "tokens" else fixed / n) for n in sizes]
        axes[place].plot(sizes, line, color=COLOURS[0], lw=1.5, label="law")
        axes[place].plot(*zip(*[p[:2] for p in points], strict=True), "o", color=COLOURS[1], label="trained")
        for row in rows if kind == "tokens" else ():
            if row["parameters"] == UNSEEN.num_parameters:
                axes[place].plot(row["multiplied"], row["bits"], "D", color=COLOURS[2], label="held-out size")
        axes[place].set_xscale("log")
        style(axes[place], title=title, x_label="N, parameters without the input embedding")
    axes[0].set_ylabel("held-out bits per byte", fontsize=9)
    axes[0].legend(frameon=False, fontsize=9)
    save(figure, path)


def main(out: Path) -> None:
    rows = {row["name"]: row for row in read_rows(out / "trials.jsonl")}
    curve = [row for name, row in rows.items() if not name.startswith("choice")]
    fitted = [row for row in curve if row["parameters"] != UNSEEN.num_parameters]
    law = fit(fitted) if len(fitted) > len(SIZES) else None
    blocks: list[Block] = [Heading("Choices"), choices_table(rows), Heading("Law"), points_table(curve, law)]
    if law is not None:
        draw(curve, law, out / "law.png")
        terms = f"L = {law.floor:.3f} + {law.a:.4g} / N^{law.alpha:.2f} + {law.b:.4g} / D^{law.beta:.2f}"
        blocks.append(
            Text(
                f"{terms}, fitted to {len(fitted)} trainings, root mean square {law.error:.4f} bits per byte."
            )
        )
        predicted = [
            [name, f"{n:.3g}", f"{d:.3g}", f"{law.at(n, d):.3f}", published]
            for name, (n, d, published) in FAMILY.items()
        ]
        blocks.append(Table(["model", "N", "D", "our law, bits per byte", "published"], predicted))
    missing = [name for name in trials() if name not in rows]
    blocks.append(Text(f"Not trained yet: {', '.join(missing) or 'nothing'}."))
    (out / "trials.md").write_text(as_markdown(blocks), encoding="utf-8")
    print(as_markdown(blocks))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
