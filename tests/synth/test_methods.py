"""The recipes that ship run, on the fake model, and make what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron4.cli.main import main

FOLDER = Path(__file__).parents[2] / "recipes" / "synth"
MADE = {
    "personas": ("sft.jsonl", 1), "evolve": ("prompts.jsonl", 8), "back_translation": ("sft.jsonl", 1),
    "magpie": ("sft.jsonl", 20), "best_of_n": ("preference.jsonl", 1), "critique": ("sft.jsonl", 8),
    "columns": ("records.jsonl", 8), "alike": ("prompts.jsonl", 8),
}  # fmt: skip


def test_every_recipe_is_run_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(MADE)


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_shipped_recipe_makes_its_rows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    out = str(tmp_path / "run")
    fake = ["--set", "endpoint.gen.form=fake", "--set", "endpoint.gen.url="]
    assert main(["synth", "plan", str(FOLDER / f"{name}.toml"), *fake]) == 0
    assert main(["synth", "run", str(FOLDER / f"{name}.toml"), "--out", out, *fake]) == 0
    assert main(["synth", "export", out]) == 0
    file, least = MADE[name]
    rows = [json.loads(line) for line in (tmp_path / "run/export" / file).read_text("utf-8").splitlines()]
    assert len(rows) >= least
    assert "note:" not in capsys.readouterr().err


def test_a_target_ends_the_run_and_the_export_has_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    out = str(tmp_path / "run")
    fake = ["--set", "endpoint.gen.form=fake", "--set", "target.sft=7"]
    for _ in range(2):
        assert main(["synth", "run", str(FOLDER / "magpie.toml"), "--out", out, *fake]) == 0
    assert main(["synth", "export", out]) == 0
    assert len((tmp_path / "run/export/sft.jsonl").read_text("utf-8").splitlines()) == 7


def test_a_turn_that_the_limit_cuts_is_filtered_and_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    fake = ["endpoint.gen.form=fake", "stage.0.max_tokens=1", "stage.0.knobs.n=30"]
    out = ["--out", str(tmp_path / "run"), *(word for each in fake for word in ("--set", each))]
    assert main(["synth", "run", str(FOLDER / "magpie.toml"), *out]) == 1  # the target is missed
    said = capsys.readouterr()
    assert "prompts: 30 filtered: truncated" in said.out + said.err
