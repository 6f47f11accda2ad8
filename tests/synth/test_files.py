"""Rows of data files in every form."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from nemotron4.errors import ConfigError, DataError
from nemotron4.synth.files import data_rows, local_file
from nemotron4.synth.stages.sources import (
    DialogueFileKnobs,
    DocumentKnobs,
    PromptFileKnobs,
    dialogue_roots,
    document_roots,
    prompt_roots,
)
from tests.synth.conftest import Bench, make_recipe


def test_prompts_are_read_from_parquet(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"question": ["What is tea?", "Why?"], "answer": ["x #### 4", "y #### 5"]}), file)
    knobs = {"file": str(file), "task": "t", "text_field": "question", "answer_field": "answer",
             "answer_after": "####"}  # fmt: skip
    bench.run(make_recipe([{"name": "in", "kind": "prompt_file", "knobs": knobs}]))
    assert sorted(row["answer"] for row in bench.rows("in").values()) == ["4", "5"]


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "caf\xc3\xa9"}\n')
    assert [row for _, row in data_rows(tmp_path / "a.jsonl")] == [{"prompt": "café"}]


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR?" * 10)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        list(data_rows(tmp_path / "a.parquet"))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["tea " * 50, "milk " * 50]}), file, compression="zstd")
    content = bytearray(file.read_bytes())
    content[4:60] = b"\xff" * 56
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        list(data_rows(file))


QUESTIONS = [
    {"question": "What is tea?\nSay it.", "answer": "x #### 4", "unsafe": False},
    {"question": 'Why, "tea"?', "answer": "y #### 5", "unsafe": True},
]


def write(rows: list[dict[str, Any]], file: Path) -> Path:
    """The rows in the form that the file's name says."""
    table = pa.Table.from_pylist(rows)
    if file.suffix in (".csv", ".tsv"):
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="," if file.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".feather":
        feather.write_feather(table, file)
    elif file.suffix == ".arrow":  # as ``save_to_disk`` writes it
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        pq.write_table(table, file)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".arrow", ".feather", ".json", ".parquet"])
def test_prompts_are_the_same_from_every_form_that_training_reads(tmp_path: Path, suffix: str) -> None:
    knobs = PromptFileKnobs(
        file=write(QUESTIONS, tmp_path / f"a{suffix}"), task="t", text_field="question",
        answer_field="answer", answer_after="####", unsafe_field="unsafe",
    )  # fmt: skip
    assert list(prompt_roots(knobs)) == [
        {"messages": [["user", QUESTIONS[0]["question"]]], "answer": "4"},
        {"messages": [["user", QUESTIONS[1]["question"]]], "answer": "5", "unsafe": True},
    ]


@pytest.mark.parametrize("form", [json.dumps, repr])
def test_lists_in_cells_of_csv_are_lists(tmp_path: Path, form: Callable[[Any], str]) -> None:
    """A list of tests that ran as a program of its own would pass whatever was written."""
    turns = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "No."}]
    row = {"messages": form(turns), "tests": form(["assert add(1, 2) == 3", "assert add(0, 0) == 0"])}
    file = write([row], tmp_path / "a.csv")
    (found,) = prompt_roots(PromptFileKnobs(file=file, task="t", tests_field="tests"))
    assert found["messages"] == [["user", "Add."]]
    assert found["tests"] == "assert add(1, 2) == 3\nassert add(0, 0) == 0"
    (dialogue,) = dialogue_roots(DialogueFileKnobs(file=file, task="t"))
    assert dialogue["messages"] == [["user", "Add."], ["assistant", "No."]]


def test_a_flag_that_is_neither_true_nor_false_and_a_short_row_are_named(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt,unsafe\nWhy?,perhaps\n")
    with pytest.raises(DataError, match=r"a\.csv:2: field 'unsafe' is 'perhaps'; expected true or false"):
        list(prompt_roots(PromptFileKnobs(file=file, task="t", unsafe_field="unsafe")))
    file.write_text("prompt,unsafe\nWhy?\n")
    with pytest.raises(DataError, match=r"a\.csv:2: the row has not the 2 fields of the header"):
        list(data_rows(file))


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Tea.\nMilk.\n")
    assert list(document_roots(DocumentKnobs(file=tmp_path / "a.txt"))) == [
        {"id": "1", "text": "Tea.\nMilk.\n"}
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}.gz"
    content = bytearray(gzip.compress(b'{"prompt": "tea"}\n' * 1000))
    content[20:40] = b"\xff" * 20
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\..*\.gz: cannot be read"):
        list(data_rows(file))


def test_a_file_on_the_hub_has_a_whole_name() -> None:
    with pytest.raises(ConfigError, match="names no file"):
        local_file(Path("hf://datasets/owner/name"))
    assert local_file(Path("data/a.jsonl")) == Path("data/a.jsonl")
