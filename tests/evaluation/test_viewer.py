"""The logs of a run are what inspect_ai reads: every conversation, its scores, reasons and judgments."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from nemotron4.evaluation.result import Result
from nemotron4.evaluation.task import Metric
from nemotron4.evaluation.viewer import LoggedSample, write_logs
from nemotron4.records import Message


def _result() -> Result:
    return Result(
        task="mine",
        name="mine",
        metrics={"accuracy": Metric(50.0, 1, 2)},
        num_items=3,
        unscored={"no response": 1},
        unparsed=0,
        data_sha256="d",
        data_is_standard=True,
        prompt_sha256="p",
        grader_sha256="g",
        seed=0,
        created_at="2026-11-29T19:00:00+00:00",
        model="m",
    )


def _samples() -> list[LoggedSample]:
    talk = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"))
    row = {"finish_reason": "length", "prompt_tokens": 3, "completion_tokens": 5, "duration_s": 0.5}
    return [
        LoggedSample(id="law/0", epoch=1, messages=talk, row=row, scores={"accuracy": 1.0}),
        LoggedSample(
            id="1",
            epoch=1,
            messages=talk,
            row=row,
            scores={"accuracy": None},
            reason="looping",
            judgments=["[[3]]"],
        ),
        LoggedSample(id="2", epoch=1, messages=talk[:2], row={}, scores={}, error="context_length"),
    ]


def test_a_log_holds_every_sample_and_replaces_the_one_before(tmp_path: Path) -> None:
    write_logs(tmp_path, _result(), _samples())
    log_of = write_logs(tmp_path, _result(), _samples())
    (path,) = tmp_path.glob("*.eval")
    assert log_of == {"law/0": path.name, "1": path.name, "2": path.name}
    with zipfile.ZipFile(path) as log:
        header = json.loads(log.read("header.json"))
        sample = json.loads(log.read("samples/1_epoch_1.json"))
    assert header["results"]["scores"][0]["metrics"]["value"]["value"] == 50
    assert header["results"]["completed_samples"] == 2
    assert sample["scores"]["accuracy"] == {"value": "unscored", "explanation": "looping\n\n[[3]]"}
    assert sample["output"]["choices"][0]["stop_reason"] == "max_tokens"


@pytest.mark.filterwarnings("default")
def test_inspect_reads_the_log(tmp_path: Path) -> None:
    inspect_log = pytest.importorskip("inspect_ai.log")
    write_logs(tmp_path, _result(), _samples())
    (path,) = tmp_path.glob("*.eval")
    log = inspect_log.read_eval_log(str(path))
    assert log.status == "success"
    assert log.eval.model == "m"
    samples = {sample.id: sample for sample in log.samples}
    assert set(samples) == {"law/0", "1", "2"}
    assert samples["law/0"].scores["accuracy"].value == 1.0
    assert samples["law/0"].output.completion == "a"
    assert samples["1"].scores["accuracy"].explanation == "looping\n\n[[3]]"
    assert samples["2"].error.message == "context_length"
    summaries = inspect_log.read_eval_log_sample_summaries(str(path))
    assert {summary.id for summary in summaries} == {"law/0", "1", "2"}
