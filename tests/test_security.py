"""``docs/security.md`` names tests that exist, and what holds for the whole package has its test here."""

from __future__ import annotations

import ast
import gzip
import re
import tomllib
from pathlib import Path

import pytest

import nemotron4.evaluation.data as evaluation_data
import nemotron4.records as records
from nemotron4.checkpoint.hub import pull_hub
from nemotron4.errors import DataError, DownloadError, TokenizerError
from nemotron4.server.settings import ServerSettings
from nemotron4.text.tokenizer_files import open_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "security.md"
# Calls that run or unpickle what they are given.
FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "marshal.loads", "os.system"}


def _rows() -> list[list[str]]:
    """The cells of every line of the page's tables, their heads left out."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in rows if row[0] != "threat"]


def _tests_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_line_names_a_test_and_every_test_named_exists() -> None:
    rows = _rows()
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[-1])
        assert named, f"no test: {row[0]}"
        for path, name in named:
            assert name in _tests_of(ROOT / path), f"{path} has no test {name}"


def _calls(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node.lineno) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("part", sorted(path.name for path in (ROOT / "nemotron4").iterdir()))
def test_nothing_unpickles_evaluates_or_goes_through_a_shell(part: str) -> None:
    folder = ROOT / "nemotron4" / part
    for path in folder.rglob("*.py") if folder.is_dir() else [folder]:
        if path.suffix != ".py":
            continue
        found = [(name, line) for name, line in _calls(path) if name in FORBIDDEN]
        assert not found, f"{path}: {found}"
        assert "shell=True" not in path.read_text(encoding="utf-8"), path


def test_every_dependency_is_pinned_for_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["plot"], *extras["synth"], *extras["eval"]]
    names = {_name(each) for each in wanted if not each.startswith("nemotron4")}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in pins)
    assert names - {_name(line) for line in pins} == set()


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found is not None
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def test_a_server_listens_on_loopback_unless_told_otherwise() -> None:
    assert ServerSettings().host == "127.0.0.1"
    assert ServerSettings().is_loopback


@pytest.mark.parametrize(
    "name", ["../x", "org/..", "../../etc/passwd", "org/../../x", "/etc", "a/b/c", "-x/y", "a/b\n"]
)
def test_a_model_s_name_cannot_leave_the_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMOTRON4_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DownloadError, match="is not a hub id"):
        pull_hub(name, endpoint="http://127.0.0.1:9")
    assert not list(tmp_path.iterdir())


def test_a_line_without_end_in_a_gzip_file_is_refused_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE_CHARACTERS", 1000)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' + b"x" * 5_000_000))
    rows = records.read_json_lines(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz:2: the line is longer than 1000 characters"):
        next(rows)


def test_a_benchmark_file_that_grows_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_data, "MAX_INFLATED_BYTES", 1000)
    path = tmp_path / "set.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(1_000_000)))
    with pytest.raises(DataError, match="grows beyond 1000 bytes"):
        evaluation_data.unpack(path)
    path.write_bytes(gzip.compress(b"fine"))
    assert evaluation_data.unpack(path) == b"fine"


@pytest.mark.parametrize("content", [b"[" * 200_000, b"\xff\xfe{", b'{"model": ' + b"9" * 5000 + b"}"])
def test_a_hostile_tokenizer_file_is_an_explained_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        open_tokenizer(tmp_path)


def test_a_hostile_row_is_an_explained_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[" * 200_000)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not valid JSON"):
        list(records.read_json_lines(path))
