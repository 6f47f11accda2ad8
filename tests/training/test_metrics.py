from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemotron4.errors import ConfigError
from nemotron4.training import metrics
from nemotron4.training.metrics import (
    JsonLines,
    StepRecord,
    open_logs,
    products_note,
)


def test_a_resumed_record_forgets_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    log = JsonLines(tmp_path)
    log.begin(0)
    for step in (1, 2, 3):
        log.write(StepRecord(step, 9, {"loss": 1.0 / step}))
    with (tmp_path / metrics.METRICS_FILE).open("a") as file:
        file.write('{"kind": "train", "st')
    log.begin(2)
    log.write(StepRecord(3, 9, {"loss": 0.5}))
    lines = [json.loads(line) for line in (tmp_path / metrics.METRICS_FILE).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, 0.5)]


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 4), (3, 5)):  # killed after step 4 with a checkpoint of step 2
        [log] = open_logs(tmp_path, ("tensorboard",), {})
        log.begin(first - 1)
        for step in range(first, last + 1):
            log.write(StepRecord(step, 5, {"loss": float(10 * first + step)}))
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 11.0), (2, 12.0), (3, 33.0), (4, 34.0), (5, 35.0)]


def logged(file: Path) -> Iterator[bytes]:
    """The records of a W&B file below 32 KiB: a header of 7 bytes, then each record behind one of 7."""
    data, at = file.read_bytes(), 7
    assert len(data) < 32 * 1024
    while at < len(data):
        end = at + 7 + int.from_bytes(data[at + 4 : at + 6], "little")
        yield data[at + 7 : end]
        at = end


@pytest.mark.slow
def test_wandb_keeps_every_step_of_a_resumed_run_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    for first, last in ((1, 3), (3, 4)):  # killed after step 3 with a checkpoint of step 2
        [log] = open_logs(tmp_path, ("wandb",), {"stage": "sft"})
        log.begin(first - 1)
        for step in range(first, last + 1):
            log.write(StepRecord(step, 4, {"loss": float(10 * first + step)}))
        log.write(StepRecord(last, 4, {"loss": 0.5}, "validation"))
        log.close()
    ids, rows = set(), []
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        ids.add(file.stem)
        for data in logged(file):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                found = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
                rows.append({name: x for name, x in found.items() if not name.startswith("_")})
    assert len(ids) == 1
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(1, 11.0), (2, 12.0), (3, 13.0), (3, 33.0), (4, 34.0)]
    assert [row["step"] for row in rows if "validation/loss" in row] == [3, 4]


def test_a_log_whose_package_is_missing_is_refused_by_name(tmp_path: Path) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"No module named 'wandb'\n.*pip install 'wandb"):
            open_logs(tmp_path, ("wandb",), {})
    else:
        pytest.skip("wandb is installed")


@pytest.mark.filterwarnings("ignore:TF32")  # of Intel's GPUs, which the switch below asks for too
def test_a_processor_without_fast_products_of_16_bits_is_told() -> None:
    cpu = torch.device("cpu")
    products_note.cache_clear()
    with torch.backends.mkldnn.flags(enabled=False):  # as on a processor without such instructions
        (line,) = products_note("bfloat16", cpu)
        assert products_note("float32", cpu) == ()
    products_note.cache_clear()
    assert line.startswith("matrix products in bfloat16 have 0.0")
    assert 'model.compute = "float32"' in line
