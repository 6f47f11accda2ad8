"""The life of a server process: the port before and after loading, signals, kill -9 and restart."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nemotron4.errors import ConfigError
from nemotron4.inference.fake import FakeEngine
from nemotron4.server.run import bind, run

PROGRAM = """
import sys, time
from pathlib import Path
from nemotron4.inference.fake import FakeEngine
from nemotron4.server.run import run
from nemotron4.server.settings import PageSettings, ServerSettings

def load():
    print("loading", file=sys.stderr, flush=True)
    while not Path(sys.argv[2]).exists():
        time.sleep(0.01)
    return FakeEngine("x" * 60, delay_s=float(sys.argv[3]))

page = PageSettings(port=int(sys.argv[4]), login=("ann", "secret")) if len(sys.argv) > 4 else PageSettings()
run(load, port=int(sys.argv[1]), settings=ServerSettings(page=page))
"""
STREAM = {"prompt": "p", "max_tokens": 60, "temperature": 0, "stream": True}


class Process:
    """A server process and what it writes to stderr."""

    def __init__(self, port: int, gate: Path, delay_s: float, page_port: int | None) -> None:
        command = [sys.executable, "-c", PROGRAM, str(port), str(gate), str(delay_s)]
        command += [] if page_port is None else [str(page_port)]
        self.popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
        self.url = ""

    def wait_for(self, pattern: str) -> str:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            if re.search(pattern, line):
                return line
        raise AssertionError(f"the server ended without writing {pattern!r}")

    def wait_ready(self) -> None:
        found = re.search(r"http://[\d.]+:\d+", self.wait_for("^ready: fake on "))
        assert found is not None
        self.url = found[0]

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait()
        assert self.popen.stderr is not None
        self.popen.stderr.close()


@contextlib.contextmanager
def _process(
    port: int, gate: Path, *, is_loaded: bool = True, delay_s: float = 0.0, page_port: int | None = None
) -> Iterator[Process]:
    if is_loaded:
        gate.touch()
    process = Process(port, gate, delay_s, page_port)
    try:
        if is_loaded:
            process.wait_ready()
        yield process
    finally:
        process.end()


def _free_port() -> int:
    with bind("127.0.0.1", 0) as listener:
        return int(listener.getsockname()[1])


def test_the_port_is_closed_until_the_engine_can_generate_and_then_logs_no_prompt(tmp_path: Path) -> None:
    port, gate = _free_port(), tmp_path / "gate"
    with _process(port, gate, is_loaded=False) as process:
        process.wait_for("^loading$")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        gate.touch()
        process.wait_ready()
        assert process.url == f"http://127.0.0.1:{port}"
        body: dict[str, Any] = {"sentences": ["a secret"], "tokens_to_generate": 2}
        assert httpx.put(f"{process.url}/generate", json=body).status_code == 200
        line = json.loads(process.wait_for('"path"'))
        assert (line["path"], line["status"], line["new_tokens"]) == ("/generate", 200, 2)
        assert "secret" not in json.dumps(line)


def test_the_page_has_a_port_of_its_own_behind_a_login(tmp_path: Path) -> None:
    page_port = _free_port()
    with _process(0, tmp_path / "gate", page_port=page_port) as process:
        page = f"http://127.0.0.1:{page_port}/"
        assert httpx.get(page).status_code == 401
        assert "<title>nemotron4</title>" in httpx.get(page, auth=("ann", "secret")).text
        body = {"sentences": ["a"], "tokens_to_generate": 1}
        assert httpx.put(f"{process.url}/generate", json=body).status_code == 200
        assert httpx.put(f"{page}generate", json=body).status_code == 401


def test_a_busy_port_is_reported_before_the_model_is_loaded() -> None:
    def load() -> FakeEngine:
        raise AssertionError("loaded")

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            run(load, port=port)


def test_of_two_servers_that_load_for_one_port_the_second_to_finish_is_told() -> None:
    closed: list[bool] = []

    class Engine(FakeEngine):
        def close(self) -> None:
            closed.append(True)

    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]

        def load() -> FakeEngine:
            first.listen()
            return Engine()

        with pytest.raises(ConfigError, match="Address already in use"):
            run(load, port=port)
    assert closed == [True]


@pytest.mark.parametrize(("host", "port"), [("no such host", 0), ("127.0.0.1", 70_000), ("192.0.2.1", 0)])
def test_an_impossible_address_is_refused(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=r"is no address|cannot listen|expected 0"):
        bind(host, port)


def test_a_signal_lets_running_requests_end_and_refuses_new_ones(tmp_path: Path) -> None:
    with _process(0, tmp_path / "gate", delay_s=0.01) as process:
        with httpx.stream("POST", f"{process.url}/v1/completions", json=STREAM) as response:
            lines = response.iter_lines()
            assert "x" in next(lines)
            process.popen.terminate()
            process.wait_for("waiting for 1 requests")
            refused = httpx.post(f"{process.url}/v1/completions", json={"prompt": "p"})
            assert refused.status_code == 503
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.popen.wait() == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{process.url}/health")


def test_a_second_signal_exits_at_once(tmp_path: Path) -> None:
    with _process(0, tmp_path / "gate", delay_s=30) as process:

        def ask() -> None:
            with contextlib.suppress(httpx.TransportError):
                httpx.post(f"{process.url}/v1/completions", json={"prompt": "p"}, timeout=60)

        client = threading.Thread(target=ask)
        client.start()
        while "nemotron4_requests_running 1.0" not in httpx.get(f"{process.url}/metrics").text:
            pass
        process.popen.send_signal(signal.SIGINT)
        process.wait_for("waiting for 1 requests; a second signal exits at once")
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait() == 128 + signal.SIGINT
        client.join()


def test_after_kill_9_a_new_server_takes_the_same_port(tmp_path: Path) -> None:
    port, gate = _free_port(), tmp_path / "gate"
    for _ in range(2):
        with _process(port, gate, delay_s=0.01) as process:
            with httpx.stream("POST", f"{process.url}/v1/completions", json=STREAM) as response:
                assert next(response.iter_raw()).startswith(b"data: ")
                process.popen.kill()
            assert process.popen.wait() == -signal.SIGKILL


DYING = """
import sys
from nemotron4.inference.fake import FakeEngine
from nemotron4.server.run import run

class Dying(FakeEngine):
    @property
    def failure(self):
        return "a worker has ended" if self.stats().requests_finished_total else None

run(lambda: Dying("x"), port=int(sys.argv[1]))
"""


def test_a_server_whose_engine_has_ended_by_itself_ends_too() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", DYING, str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("ready")
        httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "p"}, timeout=30)
        assert process.wait(timeout=20) == 1
        assert "the engine has failed: a worker has ended" in process.stderr.read()
