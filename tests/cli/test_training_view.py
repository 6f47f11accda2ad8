from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from nemotron4.cli.training_view import TrainingView, curve
from nemotron4.training.metrics import Part, StepRecord


def step(number: int, num_steps: int = 100, **values: float) -> StepRecord:
    speed = {"tokens_per_s": 3410.4, "seconds": 2.0, "mfu": 0.519, "memory_gb": 1.24}
    return StepRecord(number, num_steps, {"loss": 3.0 - number / 100, "grad_norm": 1.25, **speed, **values})


def shown(*, is_terminal: bool, progress: list[StepRecord], seconds_between: float = 0.0) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=is_terminal, width=100, highlight=False)
    now = iter(range(1000))
    with TrainingView(console=console, clock=lambda: next(now) * seconds_between) as view:
        for entry in progress:
            view.show(entry)
    return written.getvalue()


def test_a_log_gets_the_first_step_the_last_one_and_validations() -> None:
    middle = [step(number) for number in range(2, 100)]
    validation = StepRecord(50, 100, {"loss": 2.25}, "validation")
    text = shown(is_terminal=False, progress=[step(1), *middle, validation, step(100)])
    first, second, last = text.splitlines()
    assert first == "step 1/100  loss 2.9900  grad_norm 1.25  3,410 tok/s  MFU 52%  1.2 GB  left 3 min 18 s"
    assert second == "step 50/100 validation  loss 2.2500"
    assert last.startswith("step 100/100  loss 2.0000")


def test_a_log_gets_a_line_every_ten_seconds() -> None:
    text = shown(is_terminal=False, progress=[step(n) for n in range(1, 31)], seconds_between=5.0)
    assert [line.split()[1] for line in text.splitlines()] == [f"{n}/100" for n in range(1, 31, 2)]


def test_programs_get_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMOTRON4_PROGRESS", "json")
    first, last = shown(is_terminal=False, progress=[step(1), step(100)]).splitlines()
    assert json.loads(first)["left_s"] == 198.0
    assert json.loads(first)["line"].startswith("step 1/100  loss 2.9900")
    assert json.loads(last).items() >= {**step(100).to_json(), "done": 100, "total": 100}.items()


def test_a_terminal_shows_curve_rates_time_left_and_the_stages_own_numbers() -> None:
    steps = [step(n, accuracy=0.75) for n in range(1, 11)]
    text = shown(is_terminal=True, progress=[*steps, StepRecord(10, 100, {"loss": 2.25}, "validation")])
    for part in ("step 10 of 100", "about 3 min 0 s left", "loss 2.9000", "█", "▁", "3,410 tok/s  MFU 52%"):
        assert part in text
    assert "accuracy 0.75" in text
    assert "validation after step 10: loss 2.2500" in text


def test_a_long_part_is_shown_until_the_step_is_done() -> None:
    written = io.StringIO()
    now = iter(range(0, 1000, 30))
    view = TrainingView(console=Console(file=written), clock=lambda: float(next(now)))
    view.show_part(Part("reference log-probabilities", 0, 2000))
    view.show_part(Part("reference log-probabilities", 500, 2000))
    assert written.getvalue().splitlines()[-1].startswith("reference log-probabilities 500 of 2,000, about ")
    view.show(step(1))
    view.show_part(Part("answers", 12, 64, 3410))
    line = "answers 12 of 64, 3,410 tokens"
    assert written.getvalue().splitlines()[-1] == line
    console = Console(file=io.StringIO(), width=100)
    for is_shown in (True, False):
        with console.capture() as capture:
            console.print(view.panel())
        assert (line in capture.get()) == is_shown
        view.show(step(2))


def test_the_next_stage_of_a_chain_starts_its_own_curve() -> None:
    view = TrainingView(console=Console(file=io.StringIO()))
    view.show(step(90))
    view.show(step(1, num_steps=10, seconds=1.0))
    assert view.line(step(1, num_steps=10, seconds=1.0)).endswith("left 9 s")


@pytest.mark.parametrize(("values", "bars"), [([1.0, 2.0, 3.0], "▁▅█"), ([2.0, 2.0], "▁▁")])
def test_the_curve_runs_from_the_lowest_to_the_highest_value(values: list[float], bars: str) -> None:
    assert curve(values) == bars
