"""What a person sees of a training run, on stderr: a live panel, or a line now and then in a log."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nemotron4.json_form import to_json
from nemotron4.progress import LiveText, duration, is_json

if TYPE_CHECKING:
    from nemotron4.training.metrics import Part, StepRecord

NUM_RECENT = 60  # steps behind the curve and the estimate of the time left
BARS = "▁▂▃▄▅▆▇█"
# Shown in the panel's first lines, in words of their own.
RATES = ("tokens_per_s", "mfu", "memory_gb", "seconds", "tokens", "samples_seen")
IN_LOG_LINES = ("accuracy", "margin_beta", "reward_correlation", "length", "kl", "grad_norm")


class TrainingView:
    """``show`` takes each step and validation of a run, or of the stages of a chain one after the other.

    ``show_part`` takes how far a part within a step, or before the first, is.
    """

    def __init__(
        self, *, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._is_json = is_json()
        self._curve: deque[float] = deque(maxlen=NUM_RECENT)
        self._seconds: deque[float] = deque(maxlen=NUM_RECENT)
        self._newest: StepRecord | None = None
        self._last: StepRecord | None = None
        self._validation: StepRecord | None = None
        self._part: Part | None = None
        self._part_started = 0.0
        self._shown = LiveText(self._text, panel=self.panel, console=console, clock=clock)

    def __enter__(self) -> Self:
        self._shown.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._shown.stop()

    def show_part(self, part: Part) -> None:
        if self._part is None or part.name != self._part.name or part.done < self._part.done:
            self._part_started = self._clock()
        self._part = part
        self._shown.changed()

    def _text(self) -> str:
        part, newest = self._part, self._newest
        line = self.part_line(part) if part is not None else self.line(newest) if newest else ""
        if not self._is_json:
            return line
        told: dict[str, object] = {}
        if part is not None:
            told = {**to_json(part), "unit": "", "left_s": None}
        elif newest is not None:
            left_s = self._seconds_left(newest) if self._seconds else None
            amount = {"unit": "steps", "done": newest.step, "total": newest.num_steps, "left_s": left_s}
            told = {**newest.to_json(), **amount}
        return json.dumps({**told, "line": line})

    def part_line(self, part: Part) -> str:
        """``answers 12 of 64, 3,410 tokens`` or ``... 512 of 2,000, about 3 min left``"""
        line = f"{part.name} {part.done:,} of {part.total:,}"
        if part.num_tokens:  # they end when they end: no share of them tells the time left
            return f"{line}, {part.num_tokens:,} tokens"
        if not part.done:
            return line
        left = (self._clock() - self._part_started) * (part.total - part.done) / part.done
        return f"{line}, about {duration(left)} left"

    def show(self, progress: StepRecord) -> None:
        self._part, self._newest = None, progress
        if progress.kind == "validation":
            self._validation = progress
        else:
            if self._last is not None and progress.step < self._last.step:  # the next stage of a chain
                self._curve.clear()
                self._seconds.clear()
                self._validation = None
            self._last = progress
            self._curve.append(headline(progress.values)[1])
            self._seconds.append(progress.values["seconds"])
        if self._shown.is_live or (progress.kind != "validation" and progress.step != progress.num_steps):
            self._shown.changed()
        else:
            self._shown.print(self._text())

    def line(self, progress: StepRecord) -> str:
        """``step 3/100  loss 2.1312  grad_norm 1.2  3,410 tok/s  MFU 52%  1.2 GB  left 3 min 5 s``"""
        values = progress.values
        head = f"step {progress.step}/{progress.num_steps}"
        parts = [f"{head} validation" if progress.kind == "validation" else head]
        name, value = headline(values)
        parts.append(f"{name} {value:.4f}")
        parts += [f"{name} {values[name]:.3g}" for name in IN_LOG_LINES if name in values]
        if progress.kind != "validation":
            parts += _rates(values)
            parts.append(f"left {duration(self._seconds_left(progress))}")
        return "  ".join(parts)

    def _seconds_left(self, progress: StepRecord) -> float:
        return statistics.median(self._seconds) * (progress.num_steps - progress.step)

    def panel(self) -> RenderableType:
        """The live view; before the first step it says that nothing is there yet."""
        last, part = self._last, self._part  # another thread changes them
        if last is None:
            waiting = "reading data and weights ..." if part is None else self.part_line(part)
            return Panel(Text(waiting), title="nemotron4 train", title_align="left")
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"step {last.step} of {last.num_steps}",
            ProgressBar(total=last.num_steps, completed=last.step, width=32),
            f"about {duration(self._seconds_left(last))} left",
        )
        first, newest = headline(last.values)
        values = {name: value for name, value in last.values.items() if name not in (*RATES, first)}
        table = Table.grid(padding=(0, 3))
        line = Text(f"{first} {newest:.4f}  ") + Text(curve(list(self._curve)), style="cyan")
        for row in _in_columns([f"{name} {value:.4g}" for name, value in values.items()], 3):
            table.add_row(*row)
        rows: list[RenderableType] = [head, line, Text("  ".join(_rates(last.values)))]
        if self._validation is not None:
            found = self._validation
            name, value = headline(found.values)
            rows.append(Text(f"validation after step {found.step}: {name} {value:.4f}"))
        foot = [] if part is None else [Text(self.part_line(part))]
        return Panel(Group(*rows, table, *foot), title="nemotron4 train", title_align="left")


def headline(values: Mapping[str, float]) -> tuple[str, float]:
    """The number that a run is about: the reward of a policy, the loss of everything else."""
    name = "reward" if "reward" in values else "loss"
    return name, values[name]


def _rates(values: Mapping[str, float]) -> list[str]:
    parts = []
    if "tokens_per_s" in values:
        parts.append(f"{values['tokens_per_s']:,.0f} tok/s")
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.0%}")
    if "memory_gb" in values:
        parts.append(f"{values['memory_gb']:.1f} GB")
    return parts


def curve(values: list[float]) -> str:
    """The values as a line of bars, from their lowest to their highest."""
    low, high = min(values), max(values)
    if high == low:
        return BARS[0] * len(values)
    return "".join(BARS[round((value - low) / (high - low) * (len(BARS) - 1))] for value in values)


def _in_columns(cells: list[str], num_columns: int) -> list[list[str]]:
    return [cells[i : i + num_columns] for i in range(0, len(cells), num_columns)]
