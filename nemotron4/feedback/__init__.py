"""What policy-gradient training asks of the parts beside it: the engine's answers, the graders' rewards."""

from __future__ import annotations

from nemotron4.feedback.connect import connect
from nemotron4.feedback.generation import EngineGenerate

generator = EngineGenerate.of

__all__ = ["connect", "generator"]
