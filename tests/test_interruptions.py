"""Commands that ask a server, interrupted in every way: nothing that was answered is asked again or lost.

``generate``, ``eval run`` and ``convert`` have such tests in files of their own. Runs of the version before
``nemotron4/runs.py`` are continued too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemotron4.cli.main import main
from nemotron4.client import FakeBehaviour
from nemotron4.evaluation.human import Study
from nemotron4.records import Message
from nemotron4.redteam.sessions import Session, SessionStore
from tests.fake_serving import serving

OLD = Path(__file__).parent / "golden" / "runs"
NUM_PROMPTS = 30
# The database of sessions grows, too: here only the log of the run meets the full disk.
FULL_LOG = """
import errno, sys
from nemotron4 import runs
from nemotron4.cli.main import main

def append(log, *rows, whole=runs.RowLog.append):
    if len(log) > 5:
        raise OSError(errno.ENOSPC, "full", str(log.path))
    whole(log, *rows)

runs.RowLog.append = append
sys.exit(main(sys.argv[1:]))
"""
FULL_DISK = (
    "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700));"
    "from nemotron4.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


class Asked:
    """A server that takes its time, and what it was asked."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, messages: Any, sampling: Any) -> str:
        self.prompts.append(messages[-1].content)
        return "safe" + " " * 60


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
def url(asked: Asked) -> Iterator[str]:
    with serving(FakeBehaviour(script=asked, latency_s=0.03)) as address:
        yield address


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{n}", "prompt": f"{n}?"} for n in range(NUM_PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "base.jsonl").write_text(
        "".join(json.dumps({"id": f"p{n}", "response": "x"}) + "\n" for n in range(NUM_PROMPTS))
    )
    return path


def arguments(command: str, prompts: Path, url: str, out: Path) -> tuple[list[str], Path]:
    """The command, and the file in which its answers appear."""
    given = ["--prompts", str(prompts), "--out", str(out), "--concurrency", "2"]
    if command == "aegis":
        return ["redteam", "aegis", *given, "--target", url, "--classifier", url], out / "responses.jsonl"
    models = f"ours={url},base={prompts.parent / 'base.jsonl'}"
    return ["eval", "human", "new", *given, "--models", models], out / "answers-ours.jsonl"


def num_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("command", ["aegis", "human"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_costs_only_what_was_under_way(
    command: str, number: signal.Signals, prompts: Path, url: str, asked: Asked, tmp_path: Path
) -> None:
    words, answers = arguments(command, prompts, url, tmp_path / "out")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for rows_before in (4, 12):
        with subprocess.Popen(
            [sys.executable, "-m", "nemotron4", *words], stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            while num_rows(answers) < rows_before:
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.005)
            process.send_signal(number)
            _, err = process.communicate(timeout=30)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
        assert ("are kept; the same command continues" in err) == (number != signal.SIGKILL)
        assert "Traceback" not in err
    time.sleep(0.1)  # what the dead process had asked is answered by now
    kept, before = num_rows(answers), len(asked.prompts)
    assert main(words) == 0
    assert num_rows(answers) == NUM_PROMPTS
    ids = [json.loads(line)["id"] for line in answers.read_text().splitlines()]
    assert sorted(ids) == sorted(f"p{n}" for n in range(NUM_PROMPTS))
    num_judged = NUM_PROMPTS if command == "aegis" else 0
    assert len(asked.prompts) - before == NUM_PROMPTS - kept + num_judged
    assert before - kept <= 4  # two under way at each of two interruptions


@pytest.mark.parametrize("command", ["aegis", "human"])
def test_a_full_disk_is_told_in_words_and_the_same_command_continues(
    command: str, prompts: Path, url: str, tmp_path: Path
) -> None:
    words, answers = arguments(command, prompts, url, tmp_path / "out")
    if command == "human":  # its prompts are a file too, which must not be the one that is too large
        prompts.write_text("".join(prompts.read_text().splitlines(keepends=True)[:9]))
    process = subprocess.run([sys.executable, "-c", FULL_DISK, *words], capture_output=True, text=True)
    assert process.returncode == 1
    assert "file too large" in process.stderr
    assert "Traceback" not in process.stderr
    assert main(words) == 0
    assert num_rows(answers) == len(prompts.read_text().splitlines())


@pytest.mark.parametrize("how", ["kill", "term", "full disk"])
def test_an_interrupted_replay_asks_no_attack_twice(
    how: str, url: str, asked: Asked, tmp_path: Path, capsys: Any
) -> None:
    database = tmp_path / "s.sqlite"
    with SessionStore(database) as store:
        for n in range(NUM_PROMPTS):
            turns = (Message("user", f"{n}?"), Message("assistant", "old"))
            store.record(
                Session(
                    id=f"s{n}",
                    annotator="ada",
                    model="m",
                    technique="direct",
                    category="hate",
                    messages=turns,
                )
            )
            store.judge(f"s{n}", "ada", {"outcome": "success", "category": "hate"})
    words = ["redteam", "replay", str(database), "--target", url, "--judge", "refusal", "--concurrency", "2"]
    if how == "full disk":
        process = subprocess.run([sys.executable, "-c", FULL_LOG, *words], capture_output=True, text=True)
        assert process.returncode == 1
        assert "rows.jsonl: no space left" in process.stderr
    else:
        with subprocess.Popen(
            [sys.executable, "-m", "nemotron4", *words], stderr=subprocess.PIPE, text=True
        ) as running:
            while sum(map(num_rows, tmp_path.glob("s.sqlite.replays/rows.jsonl"))) < 8:
                assert running.poll() is None, running.communicate()[1]
                time.sleep(0.005)
            running.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
            _, err = running.communicate(timeout=30)
        assert "Traceback" not in err
    time.sleep(0.1)
    (log,) = tmp_path.glob("s.sqlite.replays/rows.jsonl")
    kept, before = num_rows(log) - 1, len(asked.prompts)
    assert kept > 0
    assert main([*words, "--json"]) == 1  # every attack still works
    result = json.loads(capsys.readouterr().out)
    assert result["still_works"] == NUM_PROMPTS
    assert len(asked.prompts) - before <= NUM_PROMPTS - kept  # a recorded answer counts without its row
    assert not log.exists()
    with SessionStore(database) as store:
        assert len({row["new_session"] for row in result["rows"]}) == NUM_PROMPTS


def test_an_aegis_run_of_an_earlier_version_is_continued(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    shutil.copytree(OLD / "aegis" / "run", out)
    judge = Asked()
    with serving() as target, serving(FakeBehaviour(script=judge), model="judge") as classifier:
        words = ["redteam", "aegis", "--prompts", str(OLD / "aegis" / "prompts.jsonl"), "--out", str(out)]
        assert main([*words, "--target", target, "--classifier", classifier, "--json"]) == 0
        assert main([*words, "--target", target, "--classifier", classifier, "--max-tokens", "9"]) == 1
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert len(judge.prompts) == 4  # three were judged, the fourth line was torn
    assert result["no_answer"] == {"bad_request": 1}
    assert result["readings"][0]["unsafe"] == 3
    assert "max_tokens was 512, is 9" in captured.err


def test_a_study_of_an_earlier_version_is_read_and_continued(tmp_path: Path, asked: Asked, url: str) -> None:
    folder = tmp_path / "study"
    shutil.copytree(OLD / "human" / "study", folder)
    study = Study(folder)
    assert len(study.complete_prompts) == 3
    assert len(study.ratings()) == 4
    words = ["eval", "human", "new", "--out", str(folder), "--prompts", str(OLD / "human" / "prompts.jsonl")]
    assert main([*words, "--models", f"ours={url},base={OLD / 'human' / 'base.jsonl'}"]) == 0
    assert asked.prompts == ["Question 3?"]
    assert len(Study(folder).complete_prompts) == 4
