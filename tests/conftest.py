"""Markers that skip themselves, and what the tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nemotron4.checkpoint.cache import DEMO_NAME, resolve
from nemotron4.errors import CheckpointError
from tests.browser import browser

__all__ = ["browser"]  # a fixture that every test may ask for


def pytest_configure() -> None:
    # A job started in the background ignores Ctrl-C, and so would every program that the tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _seconds(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_seconds, reverse=True)  # so that no worker is left with a long one at the end
    for marker in ("slow", "network"):
        variable = f"NEMOTRON4_{marker.upper()}"
        if os.environ.get(variable) == "1":
            continue
        skip = pytest.mark.skip(reason=f"{marker}: set {variable}=1 to run it")
        for item in items:
            if marker in item.keywords:
                item.add_marker(skip)
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("browser"))  # one worker, so one Chromium
    if _demo_model() is None:
        skip = pytest.mark.skip(reason="demo_model: run `nemotron4 pull smollm2` first")
        for item in items:
            if "demo_model" in item.keywords:
                item.add_marker(skip)


def _demo_model() -> Path | None:
    try:
        return resolve(DEMO_NAME)
    except CheckpointError:
        return None


@pytest.fixture
def demo_model() -> Path:
    """The pulled SmolLM2-135M-Instruct; a test that uses it carries the marker ``demo_model``."""
    path = _demo_model()
    assert path is not None, "mark the test with pytest.mark.demo_model"
    return path
