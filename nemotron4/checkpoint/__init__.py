"""Checkpoints on disk: reading, checking and converting them, tensor by tensor."""

from __future__ import annotations

from nemotron4.checkpoint.opening import open_checkpoint

__all__ = ["open_checkpoint"]
