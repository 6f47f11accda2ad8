"""How far a long run is: a live line on a terminal, one line now and then in a log. Always on stderr."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

PLAIN_INTERVAL_S = 10.0


class Progress:
    """Rows, tokens/s and the time left. Rates count this process only, not what an earlier start did."""

    def __init__(
        self,
        num_rows: int,
        num_done: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_rows = num_rows
        self._num_earlier = num_done
        self._num_done = num_done
        self._num_failed = 0
        self._num_tokens = 0
        self._clock = clock
        self._console = console or Console(stderr=True, highlight=False)
        self._started = self._last_printed = clock()
        self._live = (
            Live(
                console=self._console,
                get_renderable=lambda: Text(self.line()),
                refresh_per_second=4,
                transient=True,
            )
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def count_token(self) -> None:
        self._num_tokens += 1
        self._print_now_and_then()

    def count_row(self, *, is_failed: bool) -> None:
        self._num_done += 1
        self._num_failed += is_failed
        self._print_now_and_then()

    def line(self) -> str:
        """``12 of 100 rows (1 failed), 412 tokens/s, about 1 min 20 s left``"""
        elapsed_s = max(self._clock() - self._started, 1e-9)
        failed = f" ({self._num_failed} failed)" if self._num_failed else ""
        parts = [f"{self._num_done} of {self._num_rows} rows{failed}"]
        if self._num_tokens:
            parts.append(f"{self._num_tokens / elapsed_s:,.0f} tokens/s")
        num_new = self._num_done - self._num_earlier
        if num_new and self._num_done < self._num_rows:
            left_s = elapsed_s / num_new * (self._num_rows - self._num_done)
            parts.append(f"about {duration(left_s)} left")
        return ", ".join(parts)

    def _print_now_and_then(self) -> None:
        now = self._clock()
        if self._live is None and now - self._last_printed >= PLAIN_INTERVAL_S:
            self._last_printed = now
            self._console.print(self.line(), soft_wrap=True)


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 5 s``, ``2 h 10 min``"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Waiting:
    """Says that something is under way, and for how long, until the block ends."""

    def __init__(self, what: str, *, console: Console | None = None) -> None:
        self._what = what
        self._started = time.monotonic()
        self._console = console or Console(stderr=True, highlight=False)
        self._ended = threading.Event()
        self._live = Live(console=self._console, get_renderable=lambda: Text(self._line()), transient=True)
        self._thread = threading.Thread(target=self._print, daemon=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._thread.join()

    def _line(self) -> str:
        return f"{self._what}: {duration(time.monotonic() - self._started)}"

    def _print(self) -> None:
        self._console.print(f"{self._what} ...", soft_wrap=True)
        while not self._ended.wait(PLAIN_INTERVAL_S):
            self._console.print(self._line(), soft_wrap=True)
