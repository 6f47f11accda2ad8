"""A run that version 0.1 began (``earlier_run``, stopped behind step 2 of 4) goes on with this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemotron4.errors import ConfigError
from nemotron4.training import run
from nemotron4.training.recipe import Recipe, build
from tests import tiny_models

# Of the same run by that version without an interruption.
LOSSES = [7.769680786132812, 7.688977559407552, 7.795538330078125, 7.55116589864095]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NEMOTRON4_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(__file__).parent / "earlier_run", tmp_path, dirs_exist_ok=True)
    tiny_models.nemotron_directory(tmp_path / "start")
    return tmp_path


def recipe(**more: Any) -> Recipe:
    values: dict[str, Any] = {
        "stage": "sft",
        "model": {"start": "start", "device": "cpu", "activation_checkpointing": True},
        "data": {"train": ["rows.jsonl"], "max_length": 80},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1},
        "batch": {"global_size": 3, "row_tokens": 160},
        "adapter": {"kind": "lora", "rank": 1, "targets": ["q_proj"]},
        "run": {"directory": "run", "max_steps": 4, "save_every": 2, "keep_checkpoints": 1},
    }
    return build({name: table | more.get(name, {}) if isinstance(table, dict) else table
                  for name, table in values.items()})  # fmt: skip


def test_it_goes_on_with_the_same_losses(folder: Path) -> None:
    assert run.train(recipe()).steps == 4
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(LOSSES, rel=1e-5)
    assert run.train(recipe(run={"max_steps": 5})).steps == 5  # its record is of this version now


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"learning_rate": 2e-2}}, "optimizer.learning_rate was 0.01, is 0.02"),
        ({"adapter": {"use_rslora": True}}, "adapter.use_rslora was False, is True"),
    ],
)
def test_what_was_changed_is_named(folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run.train(recipe(**change))


def test_other_rows_are_another_run(folder: Path) -> None:
    rows = folder / "rows.jsonl"
    rows.write_text(rows.read_text().replace("It is", "That is"))
    with pytest.raises(ConfigError, match=r"is of another run: data\.train"):
        run.train(recipe())
