"""``nemotron4.load``: a model by name or path, ready to generate."""

from __future__ import annotations

from typing import Any


def load(model: str, **settings: Any) -> Any:
    raise NotImplementedError
