from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron4.training.plot import plot


def test_the_legend_names_every_run_whatever_the_first_panel_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    runs = [tmp_path / "a" / "01-last", tmp_path / "b" / "01-last"]
    for run, name in zip(runs, ("reward", "loss"), strict=True):
        run.mkdir(parents=True)
        lines = [{"kind": kind, "step": 1, name: 0.5} for kind in ("train", "validation")]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot(runs, tmp_path / "curves.png") == ["reward", "loss"]
    [legend] = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        f"{run}{kind}" for run in runs for kind in ("", " validation")
    ]
