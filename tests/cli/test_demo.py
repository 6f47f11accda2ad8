"""The demonstration asks what the card asks, explains what goes wrong, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import httpx
import pytest

from nemotron4.cli.demo import CARD_PROMPT, CARD_REQUEST, ask_card, stream_chat
from nemotron4.inference.fake import FakeEngine
from nemotron4.text.prompt import nemotron4
from tests.server.conftest import serving

PROGRAM = Path(__file__).with_name("demo_program.py")
RUNNER = """
    import sys
    from nemotron4.cli import demo
    from nemotron4.cli.main import explained
    keep = "--keep" in sys.argv
    demo.catch_signals()
    program = (sys.executable, sys.argv[2])
    sys.exit(explained(lambda: demo.demo(port=int(sys.argv[1]), keep=keep, program=program)))
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Demo:
    """Starts the demonstration with the fake program and knows every process it started."""

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._pids = folder / "pids"
        self._port = port

    def start(self, *options: str, **behaviour: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(RUNNER), str(self._port), str(PROGRAM), *options]
        environment = {**os.environ, "TMPDIR": str(self._folder), "FAKE_PIDS": str(self._pids), **behaviour}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *options: str, **behaviour: str) -> tuple[int, str, str]:
        process = self.start(*options, **behaviour)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def wait_for(self, name: str) -> None:
        path = self._pids if name == "pids" else self._pids.with_suffix(f".{name}")
        _wait(path.exists, f"{path} did not appear")

    def wait_for_processes(self, count: int) -> None:
        _wait(lambda: len(self.pids()) >= count, f"{count} processes were not started")

    def pids(self) -> list[int]:
        return [int(line) for line in self._pids.read_text().split()] if self._pids.exists() else []

    def assert_nothing_runs(self) -> None:
        assert self.pids()
        _wait(lambda: not any(map(_runs, self.pids())), "a process was left behind")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _wait(condition: object, message: str) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.02)


@pytest.fixture
def demo(tmp_path: Path, port: int) -> Demo:
    return Demo(tmp_path, port)


def test_request_is_the_cards() -> None:
    assert CARD_PROMPT == (
        "<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem on NVIDIA in the style of Shakespeare\n"
        "<extra_id_1>Assistant\n"
    )
    assert CARD_REQUEST["end_strings"] == ["<|endoftext|>", "<extra_id_1>", "\x11", "<extra_id_1>User"]
    assert (CARD_REQUEST["greedy"], CARD_REQUEST["tokens_to_generate"]) == (True, 1024)


def test_prints_both_answers_and_their_speed_then_stops_everything(demo: Demo) -> None:
    status, out, err = demo.run()
    assert status == 0, err
    assert out == f"{CARD_PROMPT}\nO NVIDIA, thy chips do shine.\nShall I compare \n"
    assert "7 tokens in" in err
    assert "3 tokens in" in err
    assert "the adapter that ships taught it the card's format" in err
    demo.assert_nothing_runs()


def test_both_requests_are_understood_by_the_real_server(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine("Shall I compare thee", name="smollm2", prompt_format=nemotron4())
    with serving(engine) as running, httpx.Client(base_url=running.url, trust_env=False) as client:
        card, chat = ask_card(client), stream_chat(client)
    assert (card.text, chat.text) == ("Shall I compare thee", "Shall I compare thee")
    assert card.num_tokens == chat.num_tokens == len(engine.tokenizer.encode(card.text)) + 1
    assert capsys.readouterr().out == "Shall I compare thee\n"


def test_busy_port_is_named_before_anything_starts(demo: Demo, port: int) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        status, _, err = demo.run()
    assert status == 1
    assert f"error: port {port} of 127.0.0.1 cannot be used: Address already in use" in err
    assert f"--port {port + 1}" in err
    assert demo.pids() == []


def test_failed_download_is_explained_by_pull_alone(demo: Demo) -> None:
    status, _, err = demo.run(FAKE_PULL="no network")
    assert status == 1
    assert err.endswith("error: pip could not download it\nhint: check the network\n")


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"FAKE_SERVE": "fail"}, ["the server ended before it was ready", "the model file is cut off"]),
        ({"FAKE_GENERATE": "die"}, ["the server stopped answering", "out of memory"]),
        ({"FAKE_GENERATE": "refuse"}, ["refused the card's request: greedy must be a boolean value"]),
    ],
)
def test_failure_of_the_server_is_shown(demo: Demo, behaviour: dict[str, str], words: list[str]) -> None:
    status, _, err = demo.run(**behaviour)
    assert status == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err
    demo.assert_nothing_runs()


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_signal_while_generating_leaves_no_process(demo: Demo, number: signal.Signals, status: int) -> None:
    process = demo.start(FAKE_GENERATE="hang")
    demo.wait_for("asked")
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in err
    demo.assert_nothing_runs()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_downloading_leaves_no_process(demo: Demo, number: signal.Signals) -> None:
    process = demo.start(FAKE_PULL="hang")
    demo.wait_for_processes(2)
    process.send_signal(number)
    process.communicate(timeout=30)
    demo.assert_nothing_runs()


def test_keep_leaves_the_server_and_says_how_to_stop_it(demo: Demo) -> None:
    process = demo.start("--keep", FAKE_OUTLIVES="1")
    try:
        _, err = process.communicate(timeout=60)
        server = demo.pids()[-1]
        assert process.returncode == 0, err
        assert _runs(server)
        assert f"kill {server}" in err
    finally:
        os.kill(demo.pids()[-1], signal.SIGKILL)
