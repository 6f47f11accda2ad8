from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron4.errors import ConfigError
from nemotron4.training import metrics
from nemotron4.training.metrics import JsonLines, Progress, open_logs


def test_a_resumed_record_forgets_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    log.begin(0)
    for step in (1, 2, 3):
        log.write(Progress(step, 9, {"loss": 1.0 / step}))
    with (tmp_path / metrics.METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "st')
    log.begin(2)
    log.write(Progress(3, 9, {"loss": 0.5}))
    lines = [json.loads(line) for line in (tmp_path / metrics.METRICS_FILE).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 0.5)]


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 4), (3, 5)):  # killed after step 4 with a checkpoint of step 2
        [log] = open_logs(tmp_path, ("tensorboard",), {})
        log.begin(first - 1)
        for step in range(first, last + 1):
            log.write(Progress(step, 5, {"loss": float(10 * first + step)}))
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0), (5, 35.0)]


def test_a_log_whose_package_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"wandb, which is not installed.*\n.*nemotron4\[wandb\]"):
            open_logs(tmp_path, ("wandb",), {})
    else:
        pytest.skip("wandb is installed")
