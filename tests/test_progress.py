"""What a person reads while a long run goes on."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from nemotron4.errors import ConfigError
from nemotron4.progress import PLAIN_INTERVAL_S, Progress, Waiting, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _plain() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=False, width=40), written


def test_line_tells_rows_speed_and_time_left() -> None:
    clock = Clock()
    progress = Progress(100, console=_plain()[0], clock=clock)
    for _ in range(500):
        progress.add_token()
    clock.now += 10
    for _ in range(19):
        progress.add()
    progress.add(num_failed=1)
    assert progress.line() == "20 of 100 rows (1 failed), 50 tokens/s, about 40 s left"


def test_resumed_run_estimates_from_this_process_alone() -> None:
    clock = Clock()
    progress = Progress(100, 50, console=_plain()[0], clock=clock)
    clock.now += 10
    progress.add()
    assert progress.line() == "51 of 100 rows, about 8 min 10 s left"


def test_log_gets_one_whole_line_for_each_interval() -> None:
    clock = Clock()
    console, written = _plain()
    with Progress(1000, console=console, clock=clock) as progress:
        for _ in range(30):
            clock.now += PLAIN_INTERVAL_S / 10
            progress.add()
            progress.add_token()
    lines = written.getvalue().splitlines()
    assert len(lines) == 4  # and one at the end
    assert lines[0] == "10 of 1000 rows, 1 tokens/s, about 16 min 30 s left"


def test_terminal_shows_a_live_line() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80)
    with Progress(3, console=console) as progress:
        progress.add()
    assert "1 of 3 rows" in written.getvalue()


def test_waiting_says_what_it_waits_for() -> None:
    console, written = _plain()
    with Waiting("generating", console=console):
        pass
    assert written.getvalue() == "generating ...\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7805, "2 h 10 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_bytes_are_told_as_such_with_the_file_that_is_written() -> None:
    clock = Clock()
    progress = Progress(4_000_000_000, unit="bytes", console=_plain()[0], clock=clock)
    clock.now += 2
    progress.add(1_000_000_000, detail="model-1.safetensors")
    assert progress.line() == "1.00 GB of 4.00 GB, 0.50 GB/s, about 6 s left, model-1.safetensors"


def test_an_interruption_is_answered_with_what_is_kept() -> None:
    console, written = _plain()

    def interrupted() -> None:
        with Progress(10, 2, name="mmlu", console=console) as progress:
            progress.add(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    lines = written.getvalue().splitlines()
    assert lines[0] == "mmlu: continuing: 2 of 10 rows are done"
    assert lines[-1] == "interrupted: 5 rows are kept; the same command continues"


def test_a_program_that_watches_gets_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON4_PROGRESS", "json")
    console, written = _plain()
    with Progress(10, name="mmlu", console=console) as progress:
        progress.add(4, num_failed=1)
        progress.repeated("answered 503")
    row = json.loads(written.getvalue())
    assert (row["name"], row["done"], row["total"], row["failed"], row["repeated"]) == ("mmlu", 4, 10, 1, 1)


def test_an_unknown_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON4_PROGRESS", "bars")
    with pytest.raises(ConfigError, match="expected auto or json"):
        Progress(1)
