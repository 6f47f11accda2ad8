"""Files of before all judgments had one store are read, and give what they gave then.

``old/`` was written by the version before: sessions and a ledger as SQL, a study as its folder, and next to
them what that version said of them.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nemotron4.evaluation.human import Study
from nemotron4.evaluation.human_results import evaluate
from nemotron4.records import PreferencePair, RewardSample, read
from nemotron4.redteam.session_report import export, report
from nemotron4.redteam.sessions import SessionStore
from nemotron4.synth.export import export as export_run
from nemotron4.synth.recipe import load_saved_recipe
from nemotron4.synth.review import open_reviews

OLD = Path(__file__).parent / "old"


def restore(script: Path, target: Path) -> Path:
    with closing(sqlite3.connect(target)) as db:
        db.executescript(script.read_text(encoding="utf-8"))
    return target


def without_agreements(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != "agreements"}


def test_sessions_of_the_older_form(tmp_path: Path) -> None:
    path = restore(OLD / "sessions.sql", tmp_path / "s.sqlite")
    expected = json.loads((OLD / "sessions.json").read_text(encoding="utf-8"))
    for _ in range(2):  # the first opening turns it into the new form
        with SessionStore(path, create=False) as store:
            found = store.sessions()
    assert [each.to_json() for each in found] == expected["sessions"]
    figures = report(found).to_json()
    assert without_agreements(figures) == without_agreements(expected["report"])
    (pair,), (old_pair,) = figures["agreements"], expected["report"]["agreements"]
    for name, one in pair["questions"].items():
        assert one == old_pair[name] if name in old_pair else one == old_pair["ratings"][name]
    assert export(found, "preference").to_json()["rows"] == expected["preference"]
    (sample,), (old_sample,) = export(found, "reward").to_json()["rows"], expected["reward"]
    assert (sample["attributes"], sample["messages"]) == (old_sample["attributes"], old_sample["messages"])


def test_reviews_that_the_ledger_kept(tmp_path: Path) -> None:
    shutil.copy(OLD / "run/recipe.json", tmp_path)
    restore(OLD / "run/ledger.sql", tmp_path / "ledger.sqlite")
    for _ in range(2):  # a review is taken once
        folder = export_run(tmp_path, load_saved_recipe(tmp_path)).folder
    for name in ("human_preference.jsonl", "preference.jsonl"):
        old = {row.id: row for row in read(OLD / "run" / name, PreferencePair)}
        assert {row.id: row for row in read(folder / name, PreferencePair)} == old
    given = [dict(row.attributes) for row in read(folder / "human_reward.jsonl", RewardSample)]
    assert sorted(given, key=str) == [{"helpfulness": 1.0}, {"helpfulness": 3.5, "verbosity": 0.0}]
    reviews = open_reviews(tmp_path)
    assert reviews is not None
    with reviews:
        assert len(reviews.judgments()) == 8


def test_a_study_whose_annotators_had_files(tmp_path: Path) -> None:
    shutil.copytree(OLD / "study", tmp_path / "study")
    expected = json.loads((OLD / "study.json").read_text(encoding="utf-8"))
    for _ in range(2):
        study = Study(tmp_path / "study")
        figures = evaluate(study, "base").to_json()
        study.store.close()
    assert without_agreements(figures) == without_agreements(expected)
    (pair,), (old_pair,) = figures["agreements"], expected["agreements"]
    assert pair["questions"] == {name: old_pair[name] for name in pair["questions"]}


def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    from nemotron4.errors import DataError

    with closing(sqlite3.connect(tmp_path / "x.sqlite")) as db:
        db.execute("CREATE TABLE session (id TEXT)")
    with pytest.raises(DataError, match="another program"):
        SessionStore(tmp_path / "x.sqlite")
