"""What `serve` shows while it loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.opening import watched
from nemotron4.cli.serve import _load_builtin
from tests.tiny_models import nemotron_directory


def test_a_model_that_serve_loads_says_how_much_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEMOTRON4_PROGRESS", "json")
    path = nemotron_directory(tmp_path / "tiny")
    capsys.readouterr()
    with _load_builtin(str(path), "none", None, context=None, revision=None):
        pass
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert told[-1]["name"] == "loading tiny"
    assert told[-1]["done"] == told[-1]["total"] > 100_000


def test_an_interrupted_start_promises_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = nemotron_directory(tmp_path / "tiny")
    capsys.readouterr()
    with pytest.raises(KeyboardInterrupt), watched(open_checkpoint(path)):
        raise KeyboardInterrupt
    assert "kept" not in capsys.readouterr().err
