"""kill -9 at any moment, also during the export, and a full disk: the data is the same byte for byte."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron4.cli.main import main
from nemotron4.client import FakeBehaviour
from nemotron4.client.fake_server import FakeServer
from tests.synth.conftest import ServerThread

MAX_IN_FLIGHT = 8
RECIPE = """
name = "chaos"
seed = 3
durable = "kill"
[endpoint.gen]
url = "{url}"
max_in_flight = {in_flight}
[retry]
first_wait_s = 0.01
max_wait_s = 0.05
[[stage]]
name = "macro"
kind = "macro_topics"
knobs = {{n = 5, roots = 2}}
[[stage]]
name = "open"
kind = "open_questions"
takes = ["macro"]
knobs = {{n = {questions}}}
[[stage]]
name = "revise"
kind = "revise"
takes = ["open"]
knobs = {{n = 2}}
[[stage]]
name = "near"
kind = "near_dedup"
takes = ["revise"]
[[stage]]
name = "respond"
kind = "respond"
takes = ["near"]
[[stage]]
name = "judge"
kind = "judge_llm"
takes = ["respond"]
[export]
preference = ["judge"]
prompts = ["near"]
"""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    behaviour = FakeBehaviour(latency_s=0.002, failure_rates={"rate_limit": 0.02, "server_error": 0.02})
    with ServerThread(behaviour, count_bodies=True) as running:
        yield running


def synth(*arguments: str, file_limit: int | None = None) -> subprocess.Popen[bytes]:
    def limit_files() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.Popen(
        [sys.executable, "-m", "nemotron4", "synth", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=limit_files,
    )


def here(*arguments: str) -> None:
    """What needs no kill runs in this process: starting another one takes longer than the work."""
    assert main(["synth", *arguments]) == 0


def finish(process: subprocess.Popen[bytes], status: int = 0) -> str:
    _, errors = process.communicate(timeout=100)
    assert process.returncode == status, errors.decode()
    return errors.decode()


def kill_after_calls(process: subprocess.Popen[bytes], server: FakeServer, number: int) -> None:
    """kill -9 once the server has seen so many more calls, or when the process ends by itself."""
    target = server.number + number
    while server.number < target and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def exported(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "export").iterdir())}


def write_recipe(folder: Path, server: FakeServer, questions: int) -> str:
    path = folder / "chaos.toml"
    path.write_text(RECIPE.format(url=server.url, in_flight=MAX_IN_FLIGHT, questions=questions), "utf-8")
    return str(path)


def survive(tmp_path: Path, server: FakeServer, *, num_kills: int, questions: int) -> None:
    recipe = write_recipe(tmp_path, server, questions)
    smooth, rough = tmp_path / "smooth", tmp_path / "rough"
    here("run", recipe, "--out", str(smooth), "--quiet")
    here("export", str(smooth))
    num_calls = server.number
    draw = random.Random(11)
    num_export_kills = max(1, num_kills // 5)
    for number in range(num_kills - num_export_kills):
        process = synth("run", recipe, "--out", str(rough), "--quiet")
        kill_after_calls(process, server, draw.randrange(1, max(2, num_calls // num_kills)))
        if number == 0:  # while there is certainly something left to write
            full = synth("run", recipe, "--out", str(rough), "--quiet", file_limit=_size(rough) + 8_000)
            assert b"cannot be written" in (full.communicate(timeout=100)[1] or b"")
            assert full.returncode == 1
    here("run", recipe, "--out", str(rough), "--quiet")
    failed = server.calls["/v1/chat/completions"]
    assert failed >= num_calls
    for _ in range(num_export_kills):
        process = synth("export", str(rough))
        time.sleep(draw.uniform(0.3, 1.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    here("export", str(rough))
    assert exported(rough) == exported(smooth)
    assert not list(rough.glob(".export*"))


def _size(folder: Path) -> int:
    return max(path.stat().st_size for path in folder.glob("ledger.sqlite*"))


def test_kills_and_a_full_disk_leave_the_same_bytes(tmp_path: Path, server: FakeServer) -> None:
    survive(tmp_path, server, num_kills=2, questions=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_leave_the_same_bytes(tmp_path: Path, server: FakeServer) -> None:
    survive(tmp_path, server, num_kills=20, questions=12)


def test_a_kill_pays_at_most_the_calls_in_flight_again(tmp_path: Path, server: FakeServer) -> None:
    server.behaviour = FakeBehaviour(latency_s=0.01)
    recipe = write_recipe(tmp_path, server, 4)
    process = synth("run", recipe, "--out", str(tmp_path / "run"), "--quiet")
    kill_after_calls(process, server, 150)
    here("run", recipe, "--out", str(tmp_path / "run"), "--quiet")
    assert 0 <= server.stats()["repeated_bodies"] <= MAX_IN_FLIGHT


def test_an_interrupt_ends_the_run_cleanly(tmp_path: Path, server: FakeServer) -> None:
    recipe = write_recipe(tmp_path, server, 4)
    process = synth("run", recipe, "--out", str(tmp_path / "run"))
    while server.number < 50 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert "SIGINT was received" in finish(process, 130)
