"""Input files: fetched from an address, held against a hash, never replaced."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nemotron4.errors import DataError, DownloadError
from nemotron4.evaluation.data import DataFile, DataSource, hub_rows
from nemotron4.evaluation.registry import TASKS, check_files, fetch_files, files_of
from nemotron4.evaluation.tasks import mmlu

ROWS = b'{"a": 1}\n'


@pytest.fixture
def address() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/rows" else 404)
            self.end_headers()
            self.wfile.write(ROWS)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def _file(path: str, url: str | None, content: bytes = ROWS) -> DataFile:
    return DataFile(
        path=path, sha256=hashlib.sha256(content).hexdigest(), source="there", licence="MIT", url=url
    )


def test_a_file_is_fetched_checked_and_kept_packed(address: str, tmp_path: Path) -> None:
    file = _file("set/rows.jsonl.gz", f"{address}/rows")
    assert list(fetch_files([file], tmp_path)) == ["fetched  set/rows.jsonl.gz"]
    assert gzip.decompress((tmp_path / "set/rows.jsonl.gz").read_bytes()) == ROWS
    assert [row["status"] for row in check_files([file], tmp_path)] == ["ok"]
    assert list(fetch_files([file], tmp_path)) == ["have     set/rows.jsonl.gz"]
    assert DataSource(tmp_path).read(file).rows() == [{"a": 1}]


def test_one_bad_file_does_not_keep_the_others_and_is_an_error_at_the_end(
    address: str, tmp_path: Path
) -> None:
    files = [
        _file("other.jsonl", f"{address}/rows", b"other"),
        _file("gone.jsonl", f"{address}/gone"),
        _file("good.jsonl", f"{address}/rows"),
        _file("manual.jsonl", None),
    ]
    lines = []
    with pytest.raises(DownloadError, match="2 of 4 files"):
        lines.extend(fetch_files(files, tmp_path))
    assert (tmp_path / "good.jsonl").read_bytes() == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.jsonl"]


def test_a_file_of_many_parts_is_put_together(address: str, tmp_path: Path) -> None:
    file = DataFile(
        path="whole.jsonl",
        sha256=hashlib.sha256(ROWS * 2).hexdigest(),
        source="there",
        licence="MIT",
        build=lambda download: download(f"{address}/rows") * 2,
    )
    assert list(fetch_files([file], tmp_path)) == ["fetched  whole.jsonl"]
    assert (tmp_path / "whole.jsonl").read_bytes() == ROWS * 2


def test_a_table_of_the_hub_becomes_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    stream = io.BytesIO()
    rows = [{"question": "é?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    asked: list[str] = []

    def download(url: str) -> bytes:
        asked.append(url)
        return stream.getvalue() if len(asked) == 1 else b"<html>not found</html>"

    monkeypatch.setenv("HF_ENDPOINT", "http://hub/")
    build = hub_rows("org/set", "data/test.parquet")
    assert [json.loads(line) for line in build(download).decode().splitlines()] == rows
    assert asked == ["http://hub/datasets/org/set/resolve/main/data/test.parquet"]
    with pytest.raises(DownloadError, match="not a Parquet file"):
        build(download)


def test_mmlu_is_put_together_from_its_tables() -> None:
    table = b'question,choice0,choice1,choice2,choice3,answer\n"two\nlines?",a,b,"c, d",e,2\n'
    rows = mmlu.build_questions("test", lambda url: table).decode().splitlines()
    assert len(rows) == 57
    assert json.loads(rows[0]) == {
        "subject": "abstract_algebra",
        "index": 0,
        "question": "two\nlines?",
        "choices": ["a", "b", "c, d", "e"],
        "answer": "C",
    }


def test_another_encoding_of_the_same_rows_is_the_same_file(tmp_path: Path) -> None:
    spaced = b'{"a":  1}\n'
    (tmp_path / "rows.jsonl").write_bytes(spaced)
    digest = hashlib.sha256(spaced).hexdigest()
    standard = _file("rows.jsonl", None)
    with pytest.raises(DataError, match=digest):
        DataSource(tmp_path).read(standard)
    tolerant = DataFile(path="rows.jsonl", sha256=standard.sha256, source="", licence="", same_rows=(digest,))
    assert DataSource(tmp_path).read(tolerant).sha256 == standard.sha256


def test_every_benchmark_names_source_and_licence_of_its_files() -> None:
    files = files_of([])
    assert {file.path for task in TASKS.values() for file in task.files} == {file.path for file in files}
    for file in files:
        assert file.source
        assert file.licence
        assert file.url is None or file.sha256 is not None, f"{file.path}: what is fetched must be checked"
