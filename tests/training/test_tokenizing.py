"""Texts to an indexed corpus: what is in it, in which order, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron4.checkpoint import open_checkpoint
from nemotron4.cli.main import main
from nemotron4.training import indexed
from nemotron4.training.indexed import IndexedCorpus
from nemotron4.training.reading import TrainingSource
from nemotron4.training.tokenizing import Tokenized, tokenize
from tests import tiny_models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.nemotron_directory(tmp_path_factory.mktemp("model"))


def texts(folder: Path, num: int) -> tuple[Path, list[str]]:
    found = [f"Document {i}: Shall I compare thee? <extra_id_1> " * (i % 7 + 1) for i in range(num)]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(found)))
    return path, found


def test_documents_keep_their_order_and_end_with_the_end_of_text(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, found = texts(tmp_path, 40)
    command = ["data", "tokenize", str(path), "--model", str(model), "--out", str(tmp_path / "c"), "--json"]
    assert main([*command, "--workers", "2"]) == 0
    made = json.loads(capsys.readouterr().out)
    corpus = IndexedCorpus(str(tmp_path / "c"))
    tokenizer = open_checkpoint(model).tokenizer()
    assert made["documents"] == corpus.num_documents == 40
    assert made["tokens"] == corpus.num_tokens
    assert made["ignored"] == [f"{path}: ignored: id"]
    for number, text in enumerate(found):
        expected = [*tokenizer.encode(text, parse_special=False), tokenizer.eos_id]
        assert corpus.tokens(number).tolist() == expected
    assert not [*tmp_path.glob("*.partial")]
    assert main(command) == 0  # finished: said again, not made again
    assert json.loads(capsys.readouterr().out)["tokens"] == made["tokens"]
    path.write_text('{"text": "other"}\n')
    assert main(command) != 0
    assert "is of other texts" in capsys.readouterr().err


SCRIPT = """
if __name__ == "__main__":
    import sys
    from nemotron4.training.reading import TrainingSource
    from nemotron4.training.tokenizing import tokenize
    path, model, prefix = sys.argv[1:]
    tokenize([TrainingSource(path=path)], model, prefix, num_workers=1, keep_bytes=1)
"""


@pytest.mark.slow  # three processes that import torch
def test_after_kill_9_the_same_command_makes_the_same_corpus(tmp_path: Path, model: Path) -> None:
    path, _ = texts(tmp_path, 20_000)
    (tmp_path / "make.py").write_text(SCRIPT)

    def start(prefix: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, tmp_path / "make.py", path, model, tmp_path / prefix]
        return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)

    killed = start("killed")
    log = tmp_path / "killed.run.partial"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert killed.poll() is None, killed.stderr and killed.stderr.read().decode()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert killed.stderr is not None
    with killed.stderr:
        killed.stderr.read()  # ends when the workers do, which a killed parent does not leave behind
    kept = json.loads(log.read_text().splitlines()[-1])["id"]
    assert 0 < kept < 20_000
    for prefix in ("killed", "whole"):
        run = start(prefix)
        _, said = run.communicate()
        assert run.returncode == 0, said.decode()
        assert (b"continuing" in said) == (prefix == "killed")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"killed{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


@pytest.mark.parametrize("is_published", [False, True])
def test_an_end_while_the_files_are_finished_loses_nothing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, is_published: bool
) -> None:
    """Before or behind the moment at which ``PREFIX.bin`` appears."""
    path, _ = texts(tmp_path, 40)

    def make(prefix: str) -> Tokenized:
        source = TrainingSource(path=str(path))
        return tokenize([source], str(model), str(tmp_path / prefix), num_workers=1)

    def ending(partial: Path, target: Path) -> None:
        if is_published:
            partial.rename(target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(indexed, "publish", ending)
        with pytest.raises(KeyboardInterrupt):
            make("ended")
    ended, whole = make("ended"), make("whole")
    assert (ended.documents, ended.tokens) == (whole.documents, whole.tokens) == (40, ended.tokens)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ended{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert not [*tmp_path.glob("*.partial")]


def test_more_bad_rows_than_allowed_end_without_a_corpus(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n{"words": "bad"}\n')
    command = ["data", "tokenize", str(path), "--model", str(model), "--workers", "1"]
    assert main([*command, "--out", str(tmp_path / "a")]) != 0
    assert "texts.jsonl:2" in capsys.readouterr().err
    assert not (tmp_path / "a.idx").exists()
    assert main([*command, "--out", str(tmp_path / "b"), "--max-bad-rows", "1"]) == 0
    assert IndexedCorpus(str(tmp_path / "b")).num_documents == 1


def test_what_the_command_cannot_do_is_told_with_its_own_options(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    command = [
        "data",
        "tokenize",
        str(tmp_path / "latin.jsonl"),
        "--model",
        str(model),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main([*command, "--workers", "-1"]) == 2
    assert "'--workers'" in capsys.readouterr().err
    assert main([*command, "--workers", "1"]) == 1
    assert "--latin-1" in capsys.readouterr().err
    assert main([*command, "--workers", "1", "--latin-1"]) == 0


def test_a_corpus_is_tokenized_without_torch() -> None:
    code = "import sys; import nemotron4.training.tokenizing; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
