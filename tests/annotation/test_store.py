"""The store of judgments: nothing is lost, the newest holds, several write at once."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemotron4.annotation.figures import agreements, has_state, state_of
from nemotron4.annotation.store import AnnotationStore
from nemotron4.annotation.vocabulary import ATTRIBUTE_QUESTIONS, Question, Vocabulary
from nemotron4.errors import DataError

VOCABULARY = Vocabulary(
    "test",
    (Question("verdict", {"good": "", "bad": ""}), Question("note"), *ATTRIBUTE_QUESTIONS),
    main="verdict",
)


def test_values_are_added_replaced_and_taken_back(tmp_path: Path) -> None:
    with AnnotationStore(tmp_path / "a.sqlite", VOCABULARY) as store:
        store.say("one", "ada", {"verdict": "good", "note": "x"})
        store.say("one", "ada", {"verdict": "bad"})
        store.say("one", " ada ", {"helpfulness": 3}, answer="left")
        store.say("two", "ada", {"verdict": "good"})
        store.say("two", "ada", {"verdict": None})
    with AnnotationStore(tmp_path / "a.sqlite", VOCABULARY, create=False) as store:
        found = {(each.item, each.answer): each.values for each in store.judgments()}
    assert found == {("one", ""): {"verdict": "bad", "note": "x"}, ("one", "left"): {"helpfulness": 3}}


def test_a_file_of_another_study_is_refused(tmp_path: Path) -> None:
    AnnotationStore(tmp_path / "a.sqlite", VOCABULARY).close()
    other = Vocabulary("another", VOCABULARY.questions, main="verdict")
    with pytest.raises(DataError, match="the kind 'test'; expected 'another'"):
        AnnotationStore(tmp_path / "a.sqlite", other)


def test_processes_write_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from tests.annotation.test_store import VOCABULARY
from nemotron4.annotation.store import AnnotationStore
with AnnotationStore(Path(sys.argv[1]), VOCABULARY) as store:
    for number in range(20):
        store.say(f"item {number}", sys.argv[2], {"helpfulness": number % 5}, answer="a")
"""
    path = tmp_path / "a.sqlite"
    started = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in ("ada", "bob")]
    assert [process.wait() for process in started] == [0, 0]
    with AnnotationStore(path, VOCABULARY) as store:
        assert len(store.judgments()) == 40
        (pair,) = agreements(store.judgments(), VOCABULARY)
        tokens = {store.token() for _ in range(2)}
    assert pair.questions["helpfulness"].kappa == 1.0
    assert len(tokens) == 1


def test_a_new_file_is_opened_by_several_at_once(tmp_path: Path) -> None:
    at_once = threading.Barrier(6)

    def opened(path: Path) -> None:
        at_once.wait()
        AnnotationStore(path, VOCABULARY).close()

    with ThreadPoolExecutor(6) as threads:
        for number in range(150):  # without the turns one opener in about 500 met "database is locked"
            list(threads.map(opened, [tmp_path / f"{number}.sqlite"] * 6))


def test_states_are_what_a_list_is_filtered_by(tmp_path: Path) -> None:
    with AnnotationStore(tmp_path / "a.sqlite", VOCABULARY) as store:
        store.say("one", "ada", {"verdict": "good", "note": "x"})
        store.say("one", "bob", {"verdict": "bad"})
        said = store.judgments("one")
    assert state_of(said, VOCABULARY) == "unclear"
    assert state_of([], VOCABULARY) == "open"
    wanted = {"all", "differ", "verdict=bad", "verdict=good", "note=*"}
    for state in ("all", "open", "mine", "differ", "verdict=bad", "verdict=good", "note=*"):
        assert has_state(said, state, VOCABULARY, "ada") == (state in wanted), state
    assert has_state(said, "mine", VOCABULARY, "eve")
    with pytest.raises(DataError, match="unknown question"):
        has_state(said, "vote=1", VOCABULARY, "ada")
