"""A run that an earlier version of the program began is read, continued and exported as if it were new.

``earlier_run`` was written by version 0.1.0 at commit cd02e8b: stopped by its budget of 14 calls. Its
``preference.jsonl`` is what that version exported after it had finished the run.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from nemotron4.client import FakeChatModel
from nemotron4.synth.accounting import read_accounting
from nemotron4.synth.execute import run_recipe
from nemotron4.synth.export import export
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import Budget, load_saved_recipe

EARLIER = Path(__file__).parent / "earlier_run"


def _copy(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("ledger.sqlite", "recipe.json"):
        shutil.copy(EARLIER / name, folder / name)
    return folder


def test_an_earlier_run_is_read(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    with Reader(folder / "ledger.sqlite") as ledger:
        accounting = read_accounting(ledger, load_saved_recipe(folder))
    assert accounting.is_balanced
    assert accounting.total("calls") == 14
    assert (accounting.stage("respond").done, accounting.stage("respond").pending) == (2, 10)


def test_an_earlier_run_goes_on_and_pays_nothing_twice(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    recipe = dataclasses.replace(load_saved_recipe(folder), budget=Budget())
    model = FakeChatModel()
    assert run_recipe(recipe, folder, models={"gen": model}).ending == "finished"
    assert model.calls == 51 - 14  # a run from the start makes 51
    made = export(folder, recipe).folder / "preference.jsonl"
    assert made.read_bytes() == (EARLIER / "preference.jsonl").read_bytes()
