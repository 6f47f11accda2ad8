from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemotron4.grading.sandbox import OUTPUT_BYTES, Execution, Sandbox, SandboxError, open_sandbox


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return open_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))


def run(sandbox: Sandbox, program: str, timeout_s: float = 10.0) -> Execution:
    return sandbox.run(program, timeout_s=timeout_s)


def test_a_program_passes_when_it_reaches_its_end(sandbox: Sandbox) -> None:
    execution = run(sandbox, "print('hello')\nassert 1 + 1 == 2")
    assert execution.is_passed
    assert execution.output == "hello\n"


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os; os.close(1); os.close(2)",
        "import ctypes; ctypes.string_at(0)",
        "def f(:",
        "print('end')\nraise SystemExit",
    ],
)
def test_a_program_that_ends_early_fails_whatever_its_exit_status(sandbox: Sandbox, program: str) -> None:
    execution = run(sandbox, program)
    assert not execution.is_passed
    assert execution.reason


def test_there_is_no_network(sandbox: Sandbox) -> None:
    execution = run(sandbox, "import socket\nsocket.create_connection(('127.0.0.1', 22), 2)")
    assert not execution.is_passed
    execution = run(sandbox, "import socket\nsocket.create_connection(('1.1.1.1', 53), 2)")
    assert "unreachable" in (execution.reason or "")


def test_files_outside_cannot_be_read_or_written(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    assert not run(sandbox, f"open({str(secret)!r}).read()").is_passed
    assert not run(sandbox, f"open({str(secret)!r}, 'w').write('x')").is_passed
    for place in ("/x", "/usr/x", "/dev/x", "/etc/passwd", os.path.expanduser("~/x")):
        assert not run(sandbox, f"open({place!r}, 'a').write('x')").is_passed, place
    assert secret.read_text() == "secret"
    assert run(sandbox, "import os\nassert os.listdir('.') == []\nopen('mine', 'w').write('x')").is_passed


def test_mounting_and_regaining_rights_are_refused(sandbox: Sandbox) -> None:
    program = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) != 0\n"
        "assert libc.unshare(0x10000000) != 0 or libc.mount(b'/usr', b'/tmp', None, 4096, None) != 0\n"
        "assert os.listdir('/proc') == []\n"
    )
    execution = run(sandbox, program)
    assert execution.is_passed, execution


def test_the_environment_is_empty_and_input_is_closed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "secret")
    assert run(sandbox, "import os\nassert not os.environ, os.environ").is_passed
    assert run(sandbox, "import sys\nassert sys.stdin.read() == ''").is_passed


def test_memory_file_size_and_process_limits_hold(sandbox: Sandbox) -> None:
    assert run(sandbox, "bytearray(10 << 30)").reason == "MemoryError"
    assert not run(sandbox, "open('f', 'wb').write(b'x' * (1 << 30))").is_passed
    assert run(sandbox, "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()").is_passed


def test_a_fork_bomb_ends_with_the_program(sandbox: Sandbox) -> None:
    assert not run(sandbox, "import os\nwhile True:\n    os.fork()", timeout_s=1.0).is_passed


def test_endless_output_is_capped_and_stopped(sandbox: Sandbox) -> None:
    execution = run(sandbox, "while True:\n    print('x' * 1000)", timeout_s=0.7)
    assert execution.is_timed_out
    assert len(execution.output) <= 2 * OUTPUT_BYTES
    assert run(sandbox, "print('x' * 10_000_000)").is_passed


@pytest.mark.parametrize(
    "program",
    [
        "import time\ntime.sleep(60)",
        "import signal, time\nfor s in (1, 2, 3, 15):\n    signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
        "import os, time\nos.setsid() if os.fork() == 0 else None\ntime.sleep(60)",
    ],
)
def test_the_time_limit_ends_sleeping_and_stubborn_programs(sandbox: Sandbox, program: str) -> None:
    execution = run(sandbox, program, timeout_s=0.7)
    assert execution.is_timed_out
    assert execution.reason == "stopped after 0.7 s"


def test_a_sleeping_child_does_not_hold_up_the_result(sandbox: Sandbox) -> None:
    program = "import os, time\nif os.fork() == 0:\n    time.sleep(60)"
    execution = run(sandbox, program)
    assert execution.is_passed
    assert not execution.is_timed_out


def test_signals_to_everyone_reach_nobody_outside(sandbox: Sandbox) -> None:
    run(sandbox, "import os\nos.kill(-1, 9)")
    run(sandbox, f"import os\nos.kill({os.getpid()}, 9)")


def test_a_sandbox_that_cannot_start_raises_instead_of_failing_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError):
        Sandbox("user-namespaces").run("pass", timeout_s=5)
    with pytest.raises(SandboxError, match="cannot be run in isolation"):
        open_sandbox()
    assert open_sandbox(allow_unsafe=True).isolation == "none"
