"""How far a long run is: a live line on a terminal, a line now and then in a log, or JSON. Always on stderr.

``NEMOTRON4_PROGRESS=json`` writes each line as one JSON object, for programs that watch a run.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from nemotron4.errors import ConfigError, TerminatedError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

PLAIN_INTERVAL_S = 10.0
FORM_VARIABLE = "NEMOTRON4_PROGRESS"


def is_json() -> bool:
    """What the variable asks for; ConfigError if it is no form."""
    form = os.environ.get(FORM_VARIABLE, "")
    if form not in ("", "auto", "json"):
        raise ConfigError(f"{FORM_VARIABLE} is {form!r}; expected auto or json")
    return form == "json"


def open_console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class LiveText:
    """One text that changes: redrawn on a terminal, repeated every ten seconds in a log.

    ``panel``: what a terminal shows in place of the text; it stays when the run is over.
    """

    def __init__(
        self,
        text: Callable[[], str],
        *,
        panel: Callable[[], RenderableType] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._text = text
        self._panel = panel
        self._clock = clock
        self._console = console or open_console()
        self._printed_s = float("-inf") if panel else clock()  # a panel's first line comes at once
        self._live = self._open_live() if self._console.is_terminal else None

    def _open_live(self) -> Live:
        from rich.live import Live
        from rich.text import Text

        return Live(
            console=self._console,
            get_renderable=self._panel or (lambda: Text(self._text())),
            refresh_per_second=4,
            transient=self._panel is None,
        )

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def start(self) -> None:
        if self._live is not None:
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def changed(self) -> None:
        """Call it after every change: a log gets a line when it is time for one."""
        if self._live is None and (now := self._clock()) - self._printed_s >= PLAIN_INTERVAL_S:
            self.print(self._text(), now)

    def print(self, text: str, now: float | None = None) -> None:
        self._printed_s = self._clock() if now is None else now
        self._console.print(text, soft_wrap=True, markup=False)


class Progress:
    """Rows (or bytes) done, failures, speed and the time left. Use it as a context manager.

    Rates count this process only, not the ``num_done`` of an earlier start. ``total`` may be unknown (None).
    An interruption is answered with what is kept, unless nothing is (``is_kept``).
    """

    def __init__(
        self,
        total: int | None,
        num_done: int = 0,
        *,
        name: str = "",
        unit: str = "rows",
        is_kept: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.num_done = num_done
        self.num_failed = 0
        self.num_tokens = 0
        self._name, self._unit, self._is_kept = name, unit, is_kept
        self._num_earlier = num_done
        self._num_repeated, self._trouble = 0, ""
        self._detail = ""
        self.more: dict[str, Any] = {}  # what else the JSON form has
        self._clock = clock
        self._started_s = clock()
        self._is_json = is_json()
        self._shown = LiveText(self._text, console=console, clock=clock)

    def __enter__(self) -> Self:
        self._shown.start()
        if self._num_earlier:
            self.note(f"{self._prefix}continuing: {self._amount(self._num_earlier)} are done")
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._shown.stop()
        if self.num_done > self._num_earlier or self._num_repeated:
            self._shown.print(self._text())
        if (
            self._is_kept
            and kind is not None
            and issubclass(kind, KeyboardInterrupt | TerminatedError | asyncio.CancelledError)
        ):
            kept = f"{self.num_done:,} {self._unit}" if self._unit != "bytes" else _bytes(self.num_done)
            self.note(f"interrupted: {kept} are kept; the same command continues")

    def add(self, count: int = 1, *, num_failed: int = 0, detail: str | None = None) -> None:
        """Rows or bytes that are on the disk; ``detail`` is what is worked on now."""
        self.num_done += count
        self.num_failed += num_failed
        if detail is not None:
            self._detail = detail
        self._shown.changed()

    def add_token(self) -> None:
        self.num_tokens += 1
        self._shown.changed()

    def repeated(self, message: str) -> None:
        """A request failed for now and is made again."""
        self._num_repeated += 1
        self._trouble = message
        self._shown.changed()

    def _text(self) -> str:
        return json.dumps(self.to_json(), ensure_ascii=False) if self._is_json else self.line()

    def note(self, text: str) -> None:
        """A line of its own, next to the one that changes."""
        self._shown.print(json.dumps({"note": text}, ensure_ascii=False) if self._is_json else text)

    @property
    def seconds_left(self) -> float | None:
        """None while nothing is known of the speed or the total; 0 at the end."""
        num_new = self.num_done - self._num_earlier
        if self.total is None or not num_new:
            return None
        return self._elapsed_s / num_new * max(0, self.total - self.num_done)

    def line(self) -> str:
        """``gsm8k: 12 of 100 rows (1 failed), 412 tokens/s, about 1 min 20 s left``"""
        failed = f" ({self.num_failed} failed)" if self.num_failed else ""
        parts = [f"{self._prefix}{self._amount(self.num_done)}{failed}"]
        num_new = self.num_done - self._num_earlier
        if self.num_tokens:
            parts.append(f"{self.num_tokens / self._elapsed_s:,.0f} tokens/s")
        elif self._unit == "bytes" and num_new:
            parts.append(f"{_bytes(num_new / self._elapsed_s)}/s")
        elif self._unit == "requests" and num_new:
            parts.append(f"{num_new / self._elapsed_s:.2f} requests/s")
        if (left_s := self.seconds_left) and self.num_done < (self.total or 0):
            parts.append(f"about {duration(left_s)} left")
        if self._detail:
            parts.append(self._detail)
        if self._num_repeated:
            parts.append(f"{self._num_repeated} repeated: {self._trouble}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        left_s = self.seconds_left
        return {
            "name": self._name,
            "unit": self._unit,
            "done": self.num_done,
            "total": self.total,
            "failed": self.num_failed,
            "repeated": self._num_repeated,
            "tokens": self.num_tokens,
            "elapsed_s": round(self._elapsed_s, 3),
            "left_s": None if left_s is None else round(left_s, 1),
            **self.more,
        }

    @property
    def _elapsed_s(self) -> float:
        return max(self._clock() - self._started_s, 1e-9)

    @property
    def _prefix(self) -> str:
        return f"{self._name}: " if self._name else ""

    def _amount(self, count: int) -> str:
        if self._unit == "bytes":
            return _bytes(count) if self.total is None else f"{_bytes(count)} of {_bytes(self.total)}"
        return f"{count} {self._unit}" if self.total is None else f"{count} of {self.total} {self._unit}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


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
        self._started_s = time.monotonic()
        self._shown = LiveText(self._line, console=console)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)

    def __enter__(self) -> Self:
        self._shown.start()
        if not self._shown.is_live:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._shown.stop()
        if not self._shown.is_live:
            self._thread.join()

    def _line(self) -> str:
        return f"{self._what}: {duration(time.monotonic() - self._started_s)}"

    def _print(self) -> None:
        self._shown.print(f"{self._what} ...")
        while not self._ended.wait(PLAIN_INTERVAL_S):
            self._shown.print(self._line())
