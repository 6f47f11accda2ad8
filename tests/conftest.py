"""Markers that skip themselves, and what the tests share."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker in ("slow", "network"):
        variable = f"NEMOTRON4_{marker.upper()}"
        if os.environ.get(variable) == "1":
            continue
        skip = pytest.mark.skip(reason=f"{marker}: set {variable}=1 to run it")
        for item in items:
            if marker in item.keywords:
                item.add_marker(skip)
