"""Serve, align, evaluate and generate data with Nemotron-4 class models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from nemotron4.inference.load import load as load

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that ``import nemotron4`` and ``nemotron4 --help`` load no torch.
    if name == "load":
        from nemotron4.inference.load import load

        return load
    raise AttributeError(f"module 'nemotron4' has no attribute {name!r}")
