"""The processes that a command starts: they never outlive it unless they should."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import httpx

from nemotron4.errors import Nemotron4Error
from nemotron4.progress import FORM_VARIABLE

STOP_S = 10.0
SERVER_READY_S = 1800.0  # a large model is read from disk first
TAIL_LINES = 15


def require_free_port(host: str, port: int, *, option: str = "--port ") -> None:
    """Raise if something listens there already; ``option`` is how the caller's user chooses another port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the server does: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Nemotron4Error(
                f"port {port} of {host} cannot be used: {error.strerror}",
                hint=f"stop the program that listens there, or choose another port: {option}{port + 1}",
            ) from error


def own_command(command: Sequence[str]) -> list[str]:
    """``nemotron4`` and ``python FILE.py`` are this very program, whatever PATH has, and end with us."""
    if command[0] == "nemotron4":
        return [sys.executable, "-m", "nemotron4.cli.lifeline", *command[1:]]
    if command[0] == "python" and command[1].endswith(".py"):
        return [sys.executable, "-m", "nemotron4.cli.lifeline", *command]
    return list(command)


def run_child(
    command: Sequence[str], *, stdout: int | None = None, on_line: Callable[[str], None] | None = None
) -> int:
    """Run a command and return its exit status; interrupted, end it and everything it started.

    One of ``own_command`` ends even if this process is killed. ``on_line`` takes the lines that it prints on
    either stream, progress as JSON.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE if "nemotron4.cli.lifeline" in command else subprocess.DEVNULL,
        stdout=stdout if on_line is None else subprocess.PIPE,
        stderr=None if on_line is None else subprocess.STDOUT,
        env=None if on_line is None else {**os.environ, FORM_VARIABLE: "json"},
        start_new_session=True,
        text=True,
        errors="replace",
    )
    try:
        for line in process.stdout or ():
            if on_line is not None:
                on_line(line.rstrip("\n"))
        return process.wait()
    except BaseException:
        with _uninterrupted():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        raise
    finally:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


class ChildServer:
    """``nemotron4 serve`` as a child, stopped at the end of the ``with`` block unless ``keep`` was called.

    It has a process group of its own, so that Ctrl-C reaches the demonstration alone. Its standard input is a
    pipe that nothing is written to: the command watches it and ends with its parent (``cli/lifeline.py``).
    """

    def __init__(self, command: Sequence[str], *, url: str, log: Path, may_outlive: bool = False) -> None:
        self.url = url
        self.log = log
        self._is_kept = False
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if may_outlive else subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._is_kept:
            self.stop()

    def keep(self) -> None:
        """Leave it running."""
        self._is_kept = True

    def wait_until_ready(self, *, timeout_s: float) -> None:
        """Return when it answers; it accepts no connection before it can generate."""
        deadline = time.monotonic() + timeout_s
        with httpx.Client(trust_env=False, timeout=timeout_s) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise self.failure("the server ended before it was ready")
                try:
                    client.get(f"{self.url}/health").raise_for_status()
                    return
                except httpx.TransportError:
                    time.sleep(0.05)
        raise self.failure(f"the server was not ready after {timeout_s:.0f} s")

    def failure(self, message: str) -> Nemotron4Error:
        """An error with the end of what the server wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        written = "".join(f"\n    {line}" for line in lines)
        return Nemotron4Error(f"{message}; it wrote:{written}" if lines else f"{message} and wrote nothing")

    def stop(self) -> None:
        """Ask it to end, then insist."""
        with _uninterrupted():
            self._process.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()


@contextmanager
def served(command: Sequence[str], port: int, log: Path) -> Iterator[None]:
    """A server of a recipe, from when it answers to the end of the block."""
    require_free_port("127.0.0.1", port, option="--set port=")
    with ChildServer(own_command(command), url=f"http://127.0.0.1:{port}", log=log) as server:
        server.wait_until_ready(timeout_s=SERVER_READY_S)
        yield


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C while the child is being stopped must not leave it behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    earlier = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, earlier, strict=True):
            signal.signal(number, handler)
