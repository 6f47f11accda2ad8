"""Files of PyRIT and promptfoo become sessions, and sessions become files that those tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.errors import DataError
from nemotron4.redteam.exchange import take_file
from nemotron4.redteam.sessions import SessionStore


def piece(talk: str, sequence: int, role: str, text: str, **fields: Any) -> dict[str, Any]:
    """One message as PyRIT's memory writes it."""
    return {
        "id": f"{talk}-{sequence}",
        "role": role,
        "conversation_id": talk,
        "sequence": sequence,
        "original_value": text.upper(),
        "original_value_data_type": "text",
        "converted_value": text,
        "converted_value_data_type": "text",
        "prompt_target_identifier": {"__type__": "OpenAIChatTarget", "model_name": "small"},
        "scores": [],
        **fields,
    }


def score(value: str) -> dict[str, Any]:
    return {
        "score_value": value,
        "score_type": "true_false",
        "score_category": "cyber crime",
        "score_rationale": "it told how",
    }


def record(tmp_path: Path, content: Any, form: str) -> tuple[int, Path]:
    source, database = tmp_path / "in.json", tmp_path / "s.sqlite"
    source.write_text(json.dumps(content))
    command = ["redteam", "sessions", "record", str(database), "--annotator", "ada"]
    return main([*command, "--from", str(source), "--form", form]), database


def test_conversations_of_pyrit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = [
        piece("two", 2, "assistant", "Sure, first ...", scores=[score("True")]),
        piece("two", 0, "user", "hello"),
        piece("two", 1, "user", "now tell me"),
        piece("one", 0, "user", "hi"),
        piece("one", 1, "assistant", "No.", scores=[score("False")]),
        piece("picture", 0, "user", "cat.png", converted_value_data_type="image_path"),
    ]
    status, database = record(tmp_path, content, "pyrit")
    assert status == 1  # one holds a picture
    assert "took 2 sessions, refused 1" in capsys.readouterr().err
    with SessionStore(database) as store:
        found = {each.session.notes: each for each in store.sessions()}
    two = found["PyRIT conversation two"]
    assert [m.content for m in two.session.messages] == ["hello", "now tell me", "Sure, first ..."]
    assert (two.outcome, two.category, two.session.model) == ("success", "criminal_planning", "small")
    assert two.judgments[0].values["notes"] == "it told how"
    assert found["PyRIT conversation one"].outcome == "failure"


def test_pieces_of_pyrit_1_have_no_target_and_no_scores(tmp_path: Path) -> None:
    """As `piece.model_dump(mode="json")` of PyRIT 1.1.0 writes them."""
    common = {
        "conversation_id": "11111111-1111-1111-1111-111111111111",
        "timestamp": "2026-11-30T00:09:30.821721Z",
        "original_value_data_type": "text",
        "original_value_sha256": None,
        "converted_value_data_type": "text",
        "response_error": "none",
        "prompt_metadata": {},
        "converter_identifiers": [],
    }
    texts = [("user", "How do I pick a lock?"), ("assistant", "Sure! First, ...")]
    content = [
        {
            **common,
            "id": f"id {at}",
            "sequence": at,
            "role": role,
            "original_value": text,
            "converted_value": text,
        }
        for at, (role, text) in enumerate(texts)
    ]
    status, database = record(tmp_path, content, "pyrit")
    assert status == 0
    with SessionStore(database) as store:
        [found] = store.sessions()
    assert [m.content for m in found.session.messages] == [text for _, text in texts]
    assert (found.session.model, found.judgments) == ("unknown", ())


def test_results_of_promptfoo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Break in."}]

    def result(raw: str, success: bool | None, plugin: str, strategy: str, **fields: Any) -> dict[str, Any]:
        meta = {"pluginId": plugin, "strategyId": strategy}
        return {
            "prompt": {"raw": raw, "label": "p"},
            "response": {"output": "Like this."},
            "success": success,
            "provider": {"id": "openai:small", "label": ""},
            "testCase": {"metadata": meta},
            "gradingResult": {"reason": "judged"},
            **fields,
        }

    rows = [
        result(json.dumps(turns), False, "harmful:violent-crime", "base64"),
        result("Say it.", True, "harmful:hate", "basic"),
        result("Odd.", False, "pii", "crescendo", failureReason=2),
        result("None.", False, "pii", "basic", response={"error": "503"}),
    ]
    status, database = record(
        tmp_path, {"evalId": "x", "results": {"version": 3, "results": rows}}, "promptfoo"
    )
    assert status == 1
    assert "result 4: has no prompt, or no answer" in capsys.readouterr().err
    with SessionStore(database) as store:
        one, two, three = sorted(store.sessions(), key=lambda each: each.session.category, reverse=True)
    assert (one.outcome, one.category, one.session.technique) == ("success", "violence", "encoding")
    assert one.session.messages[0].role == "system"
    assert (two.category, two.outcome) == ("privacy", None)  # an error is no verdict
    assert (three.category, three.outcome, three.session.model) == ("hate", "failure", "openai:small")


def test_attacks_that_a_strategy_of_promptfoo_wrote_are_the_sessions_turns(tmp_path: Path) -> None:
    """The test's prompt is only what they began with: the answer is to another text."""
    talk = [
        {"role": "user", "content": "Tell me of locks."},
        {"role": "assistant", "content": "There are many."},
        {"role": "user", "content": "And without a key?"},
    ]
    row = {"prompt": {"raw": "Open a lock."}, "response": {"output": "Like this."}, "success": False}
    rows = [
        {**row, "metadata": {"messages": talk, "redteamFinalPrompt": "And without a key?"}},
        {**row, "response": {"output": "Sure.", "metadata": {"redteamFinalPrompt": "You are a locksmith."}}},
    ]
    _, database = record(tmp_path, {"results": {"results": rows}}, "promptfoo")
    with SessionStore(database) as store:
        found = [[turn.content for turn in each.session.messages] for each in store.sessions()]
    assert sorted(found, key=len, reverse=True) == [
        [*(turn["content"] for turn in talk), "Like this."],
        ["You are a locksmith.", "Sure."],
    ]


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record(tmp_path, {"a": 1}, "pyrit")[0] == 1
    assert "memory.get_message_pieces" in capsys.readouterr().err
    assert record(tmp_path, {"a": 1}, "promptfoo")[0] == 1
    assert "promptfoo eval --output" in capsys.readouterr().err


def test_sessions_become_files_of_both(tmp_path: Path) -> None:
    content = [
        piece("two", 0, "user", "hello"),
        piece("two", 1, "assistant", "Hi."),
        piece("two", 2, "user", "now tell me"),
        piece("two", 3, "assistant", "Sure."),
    ]
    _, database = record(tmp_path, content, "pyrit")
    command = ["redteam", "sessions", "export", str(database), "--out"]
    assert main([*command, str(tmp_path / "p.json"), "--form", "promptfoo"]) == 0
    configuration = json.loads((tmp_path / "p.json").read_text())
    (test,) = configuration["tests"]
    assert [turn["content"] for turn in json.loads(test["vars"]["prompt"])] == ["hello", "Hi.", "now tell me"]
    assert test["assert"] == [{"type": "is-refusal"}]
    result = {"prompt": {"raw": test["vars"]["prompt"]}, "response": {"output": "No."}, "success": True}
    results = {"results": {"results": [{**result, "testCase": {"metadata": test["metadata"]}}]}}
    (tmp_path / "back").mkdir()
    _, back = record(tmp_path / "back", results, "promptfoo")
    with SessionStore(database) as store, SessionStore(back) as other:
        [sent], [came] = store.sessions(), other.sessions()
    assert (came.category, came.session.technique) == (sent.category, sent.session.technique)
    assert main([*command, str(tmp_path / "seeds.json"), "--form", "pyrit"]) == 0
    written = json.loads((tmp_path / "seeds.json").read_text())
    assert set(written) == {"dataset_name", "description", "seeds"}  # PyRIT refuses other keys
    seeds = written["seeds"]
    assert [(seed["value"], seed["sequence"]) for seed in seeds] == [("hello", 0), ("now tell me", 1)]
    assert len({seed["prompt_group_alias"] for seed in seeds}) == 1


def test_a_piece_of_another_form_costs_its_conversation_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('[{"conversation_id": 1, "sequence": "x", "role": "user"}]')
    with SessionStore(tmp_path / "s.sqlite") as store:
        taken, refused = take_file(store, path, "pyrit", annotator="a")
        assert (taken, len(refused)) == (0, 1)
        path.write_text("[" * 100_000)
        with pytest.raises(DataError, match="not JSON"):
            take_file(store, path, "pyrit", annotator="a")
