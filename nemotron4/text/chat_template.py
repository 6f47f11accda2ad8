"""A checkpoint's own chat template: Jinja written by strangers, rendered under limits."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from nemotron4.errors import TemplateError

MAX_TEMPLATE_CHARACTERS = 256 * 1024
MAX_ADDED_CHARACTERS = (
    1024 * 1024
)  # what a template may write beside the messages' own text, which it may repeat
WALL_TIME_S = 20.0  # for a machine so busy that a second of processor time takes this long
MEMORY_BYTES = 1024 * 1024 * 1024

_WORKER = Path(__file__).with_name("template_worker.py")


class ChatTemplate:
    """One template and the process that renders it, started when first needed and after it was ended.

    Safe to use from any thread. The process ends with this object, and with this program.
    """

    def __init__(self, source: str, *, name: str = "chat template", cpu_time_s: float = 1.0) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise TemplateError(
                f"{name}: {len(source)} characters; expected at most {MAX_TEMPLATE_CHARACTERS}"
            )
        self.source = source
        self._name = name
        self._cpu_time_s = cpu_time_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for ``messages``, ``add_generation_prompt`` and so on, which must be JSON values."""
        request = json.dumps({"variables": variables, "max_characters": _max_characters(variables)})
        with self._lock:
            # Ended by another's hand (a machine that stood still, the kernel short of memory) tells nothing
            # of the template, so that it is tried once more.
            result = self._ask(request) or self._ask(request)
        if result is None:
            raise TemplateError(
                f"{self._name}: the process that renders it was ended twice",
                hint="is the machine short of memory, or standing still? then repeat the request",
            )
        if "error" in result:
            where = f"{self._name}:{result['line']}" if result.get("line") else self._name
            raise TemplateError(f"{where}: {result['error']}")
        text = result["text"]
        assert isinstance(text, str)
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(ChatTemplate, name=self._name, cpu_time_s=self._cpu_time_s)
        return make, (self.source,)

    def close(self) -> None:
        """End the process; a later rendering starts a new one."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _start(self) -> subprocess.Popen[str]:
        # A session of its own keeps Ctrl-C in a terminal from ending it before the program does; -P keeps
        # the files beside the worker from being imported in place of a library.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,
        )
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)
        settings = {"template": self.source, "cpu_time_s": self._cpu_time_s, "memory_bytes": MEMORY_BYTES}
        if _exchange(process, json.dumps(settings)) is None:
            self._drop()
            raise TemplateError(
                f"{self._name}: the process that renders templates did not start",
                hint=f"run: {sys.executable} -P {_WORKER}",
            )
        return process

    def _ask(self, request: str) -> dict[str, Any] | None:
        """The worker's answer, or None if something else ended it; TemplateError if the template did."""
        process = self._process or self._start()
        result = _exchange(process, request)
        if result is None:
            status = process.wait()
            self._drop()
            if status == -signal.SIGPROF:
                raise TemplateError(
                    f"{self._name}: rendering took more than {self._cpu_time_s:g} s of processor time",
                    hint="look for loops inside loops in the template",
                )
        return result


def _max_characters(variables: Mapping[str, Any]) -> int:
    return MAX_ADDED_CHARACTERS + 2 * len(json.dumps(variables, ensure_ascii=False))


def _exchange(process: subprocess.Popen[str], line: str) -> dict[str, Any] | None:
    """Send a line and return the answer, or None if the process ended or was ended for being slow."""
    stdin, stdout = _pipes(process)
    timer = threading.Timer(WALL_TIME_S, process.kill)
    timer.start()
    try:
        stdin.write(line + "\n")
        stdin.flush()
        answer = stdout.readline()
    except BrokenPipeError:
        return None
    finally:
        timer.cancel()
    return json.loads(answer) if answer.endswith("\n") else None


def _end(process: subprocess.Popen[str]) -> None:
    stdin, stdout = _pipes(process)
    with contextlib.suppress(BrokenPipeError):
        stdin.close()
    process.kill()
    process.wait()
    stdout.close()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout
