"""Rows of data files in every form."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemotron4.errors import ConfigError, DataError
from nemotron4.synth.files import data_rows, local_file
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
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file"):
        list(data_rows(tmp_path / "a.parquet"))


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["tea " * 50, "milk " * 50]}), file, compression="zstd")
    content = bytearray(file.read_bytes())
    content[4:60] = b"\xff" * 56
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: not a Parquet file"):
        list(data_rows(file))


def test_a_file_on_the_hub_has_a_whole_name() -> None:
    with pytest.raises(ConfigError, match="names no file"):
        local_file(Path("hf://datasets/owner/name"))
    assert local_file(Path("data/a.jsonl")) == Path("data/a.jsonl")
