"""Runs a Python program that nobody has read, where it can do no harm.

The program gets its own network, process, mount and host-name namespaces: no network interface, no other
processes, a root directory that holds read-only copies of the interpreter's folders and an empty working
directory in memory, and nothing else. It has no capabilities, an empty environment, a closed standard
input, and limits on memory, processes, CPU time and file size. Its output is drained and capped, and at the
time limit all of its processes are killed with their namespace. Linux only; needs ``unshare``, ``mount``,
``pivot_root`` and ``setpriv`` of util-linux, and either root or permitted user namespaces.

A program passes by reaching its end: a random word, unknown to it, is then written. An exit status proves
nothing (``sys.exit(0)`` before the asserts). The word is in the same process as the program, so this is
protection against mistakes and harm, not against a program written to forge its own result.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from nemotron4.errors import Nemotron4Error

Isolation = Literal["namespaces", "user-namespaces", "none"]
MEMORY_BYTES = 1 << 30
NUM_PROCESSES = 16
FILE_BYTES = 16 << 20
OUTPUT_BYTES = 64 << 10
_TAIL_BYTES = 4 << 10
START_S = 30.0  # for the interpreter to come up on a busy machine; the program's own time starts after it

# Builds the root directory in memory, then gives up every right that was needed for it.
# Arguments: job folder, user id ("" keeps the namespace's), interpreter, folders to show.
_ENTER = """
set -e
job=$1 user=$2 python=$3; shift 3
mount -t tmpfs -o size=32m,mode=755,nosuid,nodev tmpfs "$job"
cd "$job"
mkdir dev tmp old proc
for folder in "$@"; do
  if [ -L "$folder" ]; then cp -P "$folder" ".$folder"
  elif [ -d "$folder" ]; then
    mkdir -p ".$folder"
    mount --rbind "$folder" ".$folder"
    mount -o remount,bind,ro,nosuid,nodev ".$folder"
  fi
done
for device in null zero urandom; do : > dev/$device; mount --bind /dev/$device dev/$device; done
mount --rbind /proc proc
pivot_root . old
umount -l /old
umount -l /proc
mount -t tmpfs -o size=16m,mode=1777,nosuid,nodev tmpfs /tmp
mount -o remount,ro,nosuid,nodev /
cd /tmp
[ -z "$user" ] || identity="--reuid=$user --regid=$user --clear-groups"
exec setpriv $identity --no-new-privs --bounding-set=-all --inh-caps=-all "$python" -I -c "$HARNESS"
"""

# Runs inside. Reads its job from standard input, which is then closed to the program.
_HARNESS = """
import json, os, resource, sys
job = json.loads(sys.stdin.buffer.read())
null = os.open(os.devnull, os.O_RDONLY)
os.dup2(null, 0)
os.environ.clear()
for name, value in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
def report(word, write=os.write, leave=os._exit, token=job["token"]):
    write(1, ("\\n" + token + word + "\\n").encode())
    if word == "end":
        leave(0)
report("start")
exec(compile(job["program"], "<program>", "exec"), {})
sys.stdout.flush()
report("end")
"""


class SandboxError(Nemotron4Error):
    """Code cannot be run in isolation here, or the isolation itself failed."""


@dataclass(frozen=True)
class Execution:
    """How a program ended. ``reason`` is the last line it wrote, or what stopped it; None if it passed."""

    is_passed: bool
    reason: str | None
    output: str
    duration_s: float
    is_timed_out: bool = False


@dataclass(frozen=True)
class Sandbox:
    """One way of running programs; get a working one from ``open_sandbox``."""

    isolation: Isolation

    def run(self, program: str, *, timeout_s: float) -> Execution:
        """Run a program to its end or its time limit. SandboxError if it could not even be started."""
        token = secrets.token_hex(16)
        job = {"program": program, "token": token, "limits": _limits(timeout_s)}
        folder = Path(tempfile.mkdtemp(prefix="nemotron4-run-"))
        started_s = time.monotonic()
        try:
            written, is_timed_out = _communicate(
                self._command(folder),
                environment=_environment(folder),
                folder=folder,
                stdin=json.dumps(job).encode(),
                start_mark=f"\n{token}start\n".encode(),
                timeout_s=timeout_s,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return _judge(written, token, is_timed_out, timeout_s, time.monotonic() - started_s)

    def _command(self, folder: Path) -> list[str]:
        # The base interpreter: a virtual environment's packages are not the program's business.
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        if self.isolation == "none":
            return [python, "-I", "-c", _HARNESS]
        shown = ["/usr", "/bin", "/lib", "/lib64"]
        if not python.startswith("/usr/"):
            shown.append(os.path.realpath(sys.base_prefix))
        # A user id of its own, so that the limit on processes counts this program's alone.
        user = str(random.randrange(1 << 20, 1 << 30)) if self.isolation == "namespaces" else ""
        rights = [] if self.isolation == "namespaces" else ["--user", "--map-root-user"]
        spaces = ["--net", "--ipc", "--uts", "--pid", "--mount", "--fork", "--kill-child"]
        if (unshare := shutil.which("unshare")) is None:
            raise SandboxError("unshare (util-linux) is not installed")
        return [unshare, *rights, *spaces, "/bin/sh", "-c", _ENTER, "sh", str(folder), user, python, *shown]


def _environment(folder: Path) -> dict[str, str]:
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HARNESS": _HARNESS, "TMPDIR": str(folder)}


def _limits(timeout_s: float) -> dict[str, int]:
    return {
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_NPROC": NUM_PROCESSES,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_CPU": int(timeout_s) + 2,
        "RLIMIT_CORE": 0,
    }


def _communicate(
    command: list[str],
    *,
    environment: dict[str, str],
    folder: Path,
    stdin: bytes,
    start_mark: bytes,
    timeout_s: float,
) -> tuple[bytes, bool]:
    """First and last bytes that the command wrote, and whether its time limit ended it."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"{command[0]} could not be started: {error}") from error
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(stdin)
                process.stdin.close()
            return _drain(process.stdout, start_mark, timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _drain(stream: IO[bytes], start_mark: bytes, timeout_s: float) -> tuple[bytes, bool]:
    head, tail = b"", b""
    has_started, deadline_s = False, time.monotonic() + START_S
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left_s := deadline_s - time.monotonic()) > 0:
            if not selector.select(left_s):
                break
            chunk = os.read(stream.fileno(), 1 << 16)
            if not chunk:
                return head + tail, False
            kept = OUTPUT_BYTES - len(head)
            head += chunk[:kept]
            tail = (tail + chunk[kept:])[-_TAIL_BYTES:]
            if not has_started and start_mark in head:
                has_started, deadline_s = True, time.monotonic() + timeout_s
    return head + tail, True


def _judge(written: bytes, token: str, is_timed_out: bool, timeout_s: float, duration_s: float) -> Execution:
    text = written.decode("utf-8", errors="replace")
    before, started, after = text.partition(f"\n{token}start\n")
    if not started:
        detail = before.strip().splitlines()
        reason = detail[-1] if detail else "no output" + (f" within {START_S:g} s" if is_timed_out else "")
        raise SandboxError(f"the sandbox did not start the program: {reason}", hint="run the command again")
    output, ended, _ = after.partition(f"\n{token}end\n")
    output = output.replace(token, "")
    if ended:
        return Execution(True, None, output, duration_s)
    if is_timed_out:
        return Execution(False, f"stopped after {timeout_s:g} s", output, duration_s, is_timed_out=True)
    lines = output.strip().splitlines()
    reason = lines[-1][:500] if lines else "ended before its last line without a message"
    return Execution(False, reason, output, duration_s)


def open_sandbox(*, allow_unsafe: bool = False) -> Sandbox:
    """The strictest sandbox that works here, found by running a harmless program in it.

    Without one, SandboxError; ``allow_unsafe`` accepts limits alone, which protect neither files nor network.
    """
    reasons = []
    as_root: list[Isolation] = ["namespaces"] if os.geteuid() == 0 else []
    kinds: list[Isolation] = [*as_root, "user-namespaces"]
    for isolation in kinds:
        sandbox = Sandbox(isolation)
        try:
            trial = sandbox.run("assert sum([1, 2]) == 3", timeout_s=20.0)
        except SandboxError as error:
            reasons.append(f"{isolation}: {error.message}")
            continue
        if trial.is_passed:
            return sandbox
        reasons.append(f"{isolation}: {trial.reason}")
    if allow_unsafe:
        return Sandbox("none")
    raise SandboxError(
        f"model-written code cannot be run in isolation here ({'; '.join(reasons)})",
        hint="allow unprivileged user namespaces, or accept the risk with --unsafe-no-sandbox",
    )
