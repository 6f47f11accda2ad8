"""What the server notes about one HTTP exchange, from the first byte to the line in the access log."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

KEY = "nemotron4.exchange"


@dataclass
class Exchange:
    """Filled in as the request is served; holds no prompt and no answer."""

    request_id: str
    method: str
    path: str
    route: str = "other"  # a known path, so that a metric has few label values
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    guard: list[str] = field(default_factory=list)  # verdicts: no text
    error: str | None = None  # the class of an unexpected exception


def exchange_of(scope: MutableMapping[str, Any]) -> Exchange:
    """The exchange that the outermost layer put into the request's scope."""
    found = scope[KEY]
    assert isinstance(found, Exchange)
    return found
