"""One JSON line on stderr for each finished request. Never a prompt, an answer, a header or an address."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from typing import TextIO

from nemotron4.server.exchange import Exchange


class AccessLog:
    """Writes to the stream that is stderr when the line is written, unless another is given."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def __call__(self, exchange: Exchange, trace: list[str]) -> None:
        line: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": exchange.request_id,
            "method": exchange.method,
            "path": exchange.path,
            "status": exchange.status,
            "ms": round(1000 * (time.monotonic() - exchange.started), 1),
            "prompt_tokens": exchange.num_prompt_tokens,
            "new_tokens": exchange.num_new_tokens,
            "finish_reasons": exchange.finish_reasons,
        }
        if exchange.guard:
            line["guard"] = exchange.guard
        if exchange.error is not None:
            line["error"] = exchange.error
        if trace:
            line["trace"] = trace
        print(json.dumps(line), file=self._stream or sys.stderr, flush=True)
