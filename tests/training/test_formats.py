"""Rows of every accepted form, and what is said about the others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nemotron4.errors import DataError
from nemotron4.records import FieldError, Message
from nemotron4.training import stage
from nemotron4.training.encoding import Problem, ReadRow
from nemotron4.training.kto import JudgedRow
from nemotron4.training.reading import TrainingSource, refuse_too_many
from nemotron4.training.reading import read_rows as read_source
from nemotron4.training.rows import Fields
from nemotron4.training.stages.preference import PairRow
from nemotron4.training.stages.reward import ScoredRow
from nemotron4.training.stages.sft import AnswerRow, ChatRow

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
REWARDS = {"chosen_reward": 3, "rejected_reward": 1.5}
PROMPT = (Message("user", "hi"),)


def parse(kind: str, row: dict) -> object:
    fields = Fields(row)
    parsed = stage.kinds()[kind].parse(fields)
    fields.unread()
    return parsed


def read_rows(paths: list[Path], kind: str) -> tuple[list[ReadRow], list[Problem]]:
    found = [
        each for path in paths for each in read_source(TrainingSource(path=str(path)), stage.kinds()[kind])
    ]
    return (
        [each for each in found if isinstance(each, ReadRow)],
        [each for each in found if isinstance(each, Problem)],
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [{**USER, "role": "human"}, {**ANSWER, "role": "model"}]},
        {"prompt": [USER], "completion": "hello"},
        {
            "mask": "User",
            "conversations": [{"from": "User", "value": "hi"}, {"from": "Assistant", "value": "hello"}],
        },
    ],
    ids=["openai", "trl", "trl string answer", "nemo-aligner"],
)
def test_chat_rows_of_every_form_are_the_same_conversation(row: dict) -> None:
    assert parse("sft", row) == ChatRow(messages=(*PROMPT, Message("assistant", "hello")))


@pytest.mark.parametrize("names", [("input", "output"), ("prompt", "completion"), ("prompt", "response")])
def test_a_string_prompt_is_taken_as_rendered(names: tuple[str, str]) -> None:
    row = dict(zip(names, ("Q: hi A:", " hello"), strict=True))
    assert parse("sft", row) == AnswerRow(prompt="Q: hi A:", answer=" hello")


def test_steerlm_labels_stand_before_their_answers() -> None:
    row = parse(
        "sft",
        {
            "system": "be kind", "mask": "User", "type": "VALUE_TO_TEXT",
            "conversations": [
                {"from": "User", "value": "hi", "label": None},
                {"from": "Assistant", "value": "hello", "label": "quality:4,toxicity:0"},
            ],
        },
    )  # fmt: skip
    assert isinstance(row, ChatRow)
    assert row.messages[0] == Message("system", "be kind")
    assert row.labels == {2: {"quality": 4, "toxicity": 0}}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": "good", "rejected": "bad", **REWARDS},
        {"prompt": [USER], "chosen_response": "good", "rejected_response": "bad", **REWARDS},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], **REWARDS},
        {"context": [USER], "completions": [
            {"rank": 1, "completion": [BAD], "reward": 1.5},
            {"rank": 0, "completion": [GOOD], "reward": 3},
        ]},
    ],
    ids=["ours and trl", "nemo-aligner", "trl implicit prompt", "nemo-rl"],
)  # fmt: skip
def test_pairs_of_every_form_are_the_same_pair(row: dict) -> None:
    assert parse("preference", row) == PairRow(
        prompt=PROMPT, chosen="good", rejected="bad", chosen_reward=3.0, rejected_reward=1.5
    )


def test_helpsteer_preference_strength_says_which_response_won() -> None:
    row = {"prompt": "hi", "response_1": "a", "response_2": "b", "preference_strength": -2}
    assert parse("preference", row) == PairRow(prompt=PROMPT, chosen="a", rejected="b", strength=2.0)
    swapped = parse("preference", row | {"preference_strength": 3})
    assert swapped == PairRow(prompt=PROMPT, chosen="b", rejected="a", strength=3.0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "response": "x", "preference": "rejected"},
        {"prompt": [USER], "completion": "x", "label": False},
    ],
    ids=["nemo-aligner", "trl"],
)  # fmt: skip
def test_judged_rows_of_every_form_are_the_same(row: dict) -> None:
    assert parse("kto", row) == JudgedRow(prompt=PROMPT, answer="x", is_desirable=False)


def test_regression_labels_follow_the_published_order_and_drop_missing_cells() -> None:
    row = parse("reward", {"text": "t", "label": [-100, -100, -100, -100, 4, 3, 2, 1, -100]})
    assert row == ScoredRow(
        conversation="t", attributes={"helpfulness": 4, "correctness": 3, "coherence": 2, "complexity": 1}
    )


def test_helpsteer_rows_are_scored_conversations() -> None:
    row = parse("reward", {"prompt": "hi", "response": "hello", "helpfulness": 3, "verbosity": 2})
    assert row == ScoredRow(
        conversation=(*PROMPT, Message("assistant", "hello")), attributes={"helpfulness": 3, "verbosity": 2}
    )


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("sft", {"text": "x"}, "messages, conversations"),
        ("sft", {"messages": [{"role": "user"}]}, r"messages\[0\].*'content' is missing"),
        ("sft", {"mask": "Assistant", "conversations": [{"from": "User", "value": "x"}]}, "mask"),
        ("sft", {"mask": "Use", "conversations": [{"from": "User", "value": "x"}]}, "would train"),
        ("preference", {"prompt": [USER], "chosen": "x"}, "'rejected' is missing"),
        ("preference", {"prompt": [USER], "chosen": "x", "rejected": 3}, "'rejected' is 3"),
        ("preference", {"chosen": "x", "rejected": "y"}, "'prompt' is missing"),
        (
            "preference",
            {"prompt": [USER], "chosen": "x", "rejected": "y", "chosen_reward": float("nan")},
            "finite",
        ),
        (
            "preference",
            {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": 0},
            "neither",
        ),
        ("kto", {"prompt": [USER], "response": "x", "preference": "good"}, "'chosen' or 'rejected'"),
        ("kto", {"prompt": [USER], "completion": "x", "label": 1}, "true or false"),
        ("reward", {"text": "t", "label": [1, 2]}, "9 numbers"),
        ("reward", {"messages": [USER], "attributes": {}}, "ends with user"),
        ("reward", {"messages": [USER, ANSWER], "attributes": {"help": 1}}, "'help'"),
    ],
)
def test_a_wrong_row_is_refused_with_its_field(kind, row: dict, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        parse(kind, row)


def write_lines(path: Path, lines: list[str]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_every_bad_line_is_found_and_named(tmp_path: Path, name: str) -> None:
    good = json.dumps({"messages": [USER, ANSWER]})
    path = write_lines(tmp_path / name, [good, "{oops", "[1]", '{"x": 1}', good])
    rows, problems = read_rows([path], "sft")
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:5"]
    assert [problem.where for problem in problems] == [f"{path}:{n}" for n in (2, 3, 4)]
    with pytest.raises(DataError, match=r"3 of 5 rows.*\n.*rows\.jsonl.*:2: not valid JSON"):
        refuse_too_many(problems, 5, 2)
    refuse_too_many(problems, 5, 3)


def test_parquet_rows_read_like_json_lines(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(
        [{"prompt": [USER], "chosen": "a", "rejected": "b", "chosen_reward": None}]
    )
    parquet.write_table(table, tmp_path / "pairs.parquet")
    rows, problems = read_rows([tmp_path / "pairs.parquet"], "preference")
    assert not problems
    assert rows[0].row == PairRow(prompt=PROMPT, chosen="a", rejected="b")


def test_binary_reward_texts_pair_up_chosen_first(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rm.jsonl", [json.dumps({"text": t}) for t in ("good", "bad", "alone")])
    rows, problems = read_rows([path], "reward_pairs")
    assert [row.row for row in rows] == [PairRow(prompt="", chosen="good", rejected="bad")]
    assert [problem.where for problem in problems] == [f"{path}:3"]


def test_a_plain_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Call me\nIshmael.")
    rows, _ = read_rows([tmp_path / "book.txt"], "pretrain")
    assert [row.raw for row in rows] == [{"text": "Call me\nIshmael."}]


def test_a_folder_that_datasets_saved_reads_like_json_lines(tmp_path: Path) -> None:
    """The layout of datasets 5: Arrow streams, listed by state.json."""
    pyarrow = pytest.importorskip("pyarrow")
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    for i, part in enumerate((pairs[:1], pairs[1:])):
        table = pyarrow.Table.from_pylist(part)
        with pyarrow.ipc.new_stream(tmp_path / f"data-{i:05}-of-00002.arrow", table.schema) as file:
            file.write_table(table)
    state = {"_data_files": [{"filename": f"data-{i:05}-of-00002.arrow"} for i in range(2)]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    rows, problems = read_rows([tmp_path], "preference")
    assert problems == []
    assert [row.raw for row in rows] == pairs
    assert rows[1].where.endswith("data-00001-of-00002.arrow:1")


def test_a_folder_of_files_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in (("b.jsonl", "second"), ("a.jsonl", "first"), ("README.md", "no rows")):
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n")
    rows, _ = read_rows([tmp_path], "pretrain")
    assert [row.raw["text"] for row in rows] == ["first", "second"]


def test_a_folder_of_splits_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(DataError, match="with the splits test, train"):
        read_rows([tmp_path], "sft")
