"""Rows on disk: each kind is written and read back, and a wrong row is named by file, line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nemotron4 import records
from nemotron4.errors import DataError
from nemotron4.records import Conversation, Generation, Message, PreferencePair, Record, RewardSample

TALK = (Message("user", "Hi"), Message("assistant", "Hello"))
ROWS: list[tuple[Record, dict[str, Any]]] = [
    (
        Conversation(messages=TALK, id="a"),
        {
            "id": "a",
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        },
    ),
    (
        PreferencePair(prompt=TALK[:1], chosen="x", rejected="y", chosen_reward=1.5),
        {
            "prompt": [{"role": "user", "content": "Hi"}],
            "chosen": "x",
            "rejected": "y",
            "chosen_reward": 1.5,
        },
    ),
    (
        RewardSample(messages=TALK, attributes={"helpfulness": 3.0}, meta={"by": 2}),
        {
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
            "attributes": {"helpfulness": 3.0},
            "meta": {"by": 2},
        },
    ),
    (
        Generation(text="x", token_ids=(1, 2), finish_reason="stop", num_prompt_tokens=3),
        {"text": "x", "token_ids": [1, 2], "finish_reason": "stop", "num_prompt_tokens": 3},
    ),
]


@pytest.mark.parametrize(("record", "row"), ROWS, ids=lambda value: type(value).__name__)
def test_a_record_has_one_form(tmp_path: Path, record: Record, row: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl.gz"
    assert records.write(path, [record, row]) == 2
    assert [found for _, found in records.read_json_lines(path)] == [row, row]
    assert list(records.read(path, type(record))) == [record, record]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "field 'messages' is empty; expected at least one message"),
        ({"messages": [{"role": "user"}]}, "messages[0]: field 'content' is missing; expected a string"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages[0]: field 'tool_calls' has a call of a tool; expected a text alone",
        ),
        ({}, "field 'messages' is missing"),
        ({"messages": "Hi"}, "field 'messages' is \"Hi\"; expected a list of messages"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        list(records.read(path, Conversation))
    assert caught.value.message.startswith(f"{path}:2: {words}")


def test_an_attribute_without_a_value_is_not_trained() -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}], "attributes": {"coherence": 2, "verbosity": None}}
    assert RewardSample.from_json(row).attributes == {"coherence": 2.0}


def test_half_a_surrogate_pair_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00 \\\\ud83d"}\n{"text": "\\ud83d"}\n')
    rows = records.read_json_lines(path)
    assert next(rows)[1] == {"text": "\U0001f600 \\ud83d"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .*surrogate"):
        next(rows)


def test_an_object_with_one_key_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "meta": {"x": 1, "y": 2}}\n{"text": "a", "meta": {"x": 1, "x": 2}}\n')
    rows = records.read_json_lines(path)
    assert next(rows)[1] == {"text": "a", "meta": {"x": 1, "y": 2}}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* key 'x' twice"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a\.jsonl: not UTF-8 text: byte 0xe9"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n', mtime=0)[:-9], r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", b"{}", r"a\.jsonl\.gz: cannot be read"),
    ],
)
def test_another_encoding_and_a_cut_file_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(records.read_json_lines(tmp_path / name))
