"""What every route needs: the engine, the settings, the metrics, and whether the server is on its way out."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemotron4.engine import InferenceEngine
from nemotron4.server.guard import Guard
from nemotron4.server.metrics import Metrics
from nemotron4.server.settings import ServerSettings


@dataclass
class Gate:
    """Lets requests in until the server drains."""

    is_draining: bool = False
    num_in_flight: int = 0


@dataclass(frozen=True)
class Service:
    """One per app."""

    engine: InferenceEngine
    settings: ServerSettings
    metrics: Metrics
    gate: Gate = field(default_factory=Gate)
    guard: Guard | None = None
