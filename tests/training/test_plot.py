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


def test_the_loss_leads_smoothed_under_the_settings_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    lines = [
        {"kind": "train", "step": step, "grad_norm": 1.0, "loss": step % 2, "tokens_per_s": 9.0}
        for step in range(1, 101)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "stage": "sft", "model": {"start": "smollm2"}, "optimizer": {"learning_rate": 2e-5},
        "batch": {"global_size": 16}, "run": {"seed": 3},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe}))
    plot([tmp_path], tmp_path / "curves.png")
    [figure] = drawn
    assert figure.get_suptitle() == "sft of smollm2: rate 2e-05, 16 samples a step, seed 3"
    figure.draw_without_rendering()
    areas = {
        axes.get_title(loc="left"): axes.get_position().width * axes.get_position().height
        for axes in figure.axes
    }
    assert max(areas, key=areas.__getitem__) == "loss"
    assert set(areas) == {"loss", "gradient norm", "tokens per second"}
    raw, smooth = (line.get_ydata() for line in figure.axes[0].lines)
    assert list(raw) == [step % 2 for step in range(1, 101)]
    assert 0.35 < min(smooth[20:]) < max(smooth[20:]) < 0.65
