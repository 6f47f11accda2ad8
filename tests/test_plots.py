"""Pictures: the same data give the same bytes, names are words, and every kind is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron4.errors import ConfigError
from nemotron4.plots import (
    Curve,
    draw_bar_panels,
    draw_bars,
    draw_curves,
    draw_histograms,
    draw_radar,
    draw_stacks,
    words,
)
from nemotron4.report import Bar, Bars

BARS = Bars(
    "Attacks withstood",
    "%",
    [Bar("jailbreaks", 89.7, 76.4, 95.9, "35/39", "a"), Bar("leaks", None, label="not run", series="a")],
    100,
)


def _is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_bars_give_the_same_bytes_twice(tmp_path: Path) -> None:
    first, second = draw_bars(BARS, tmp_path / "a.png"), draw_bars(BARS, tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes()


def test_every_kind_is_drawn(tmp_path: Path) -> None:
    two = Bars("Two models", "%", [Bar("x", 1.0, series="a"), Bar("x", 2.0, series="b")])
    assert _is_png(draw_bar_panels([BARS, two, two], tmp_path / "p.png", muted=["b"], num_columns=2))
    assert _is_png(draw_histograms({"": [1.0, 2.0]}, tmp_path / "h.png", title="t", x_label="x", y_label="y"))
    curves = {"grad_norm": [Curve("run", [(1, 2.0), (2, 1.0)], 0), Curve("other", [(1, 1.0)], 1, True)]}
    assert _is_png(draw_curves(curves, tmp_path / "c.png", x_label="step"))
    assert _is_png(
        draw_stacks(
            ["s0"], {"weights": [1.0]}, tmp_path / "s.png", title="t", unit="GB", limits={"usable": 2.0}
        )
    )
    assert _is_png(
        draw_radar(["a", "b", "c"], {"m": [1.0, None, 2.0]}, tmp_path / "r.png", title="t", limit=10)
    )


def test_no_field_name_is_shown() -> None:
    assert words("grad_norm") == "gradient norm"
    assert words("reward_correlation") == "reward correlation"


def test_an_unknown_form_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_bars(BARS, tmp_path / "x.xyz")
