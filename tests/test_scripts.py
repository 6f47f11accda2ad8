"""``scripts/setup`` with a Python that only pretends: what it installs, and what it says when it cannot."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Stands for python3.11 and for .venv/bin/python: writes pip calls down, leaves the rest to the real one.
FAKE_PYTHON = f"""\
#!/usr/bin/env bash
case "$*" in
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-c import torch" | "-c import pip") [ -e .venv/has-"${{2#import }}" ] ;;
"-m pip"*)
    echo "$*" >>pip-calls
    case "$FAKE_PIP $*" in
    *--dry-run*) ;;
    broken*) echo "ERROR: the wheel is broken"; exit 1 ;;
    esac
    case "$FAKE_PIP" in
    offline) echo "ERROR: No matching distribution found for torch" >&2; exit 1 ;;
    hang) echo "Collecting torch"; echo $$ >pip-pid; sleep 600 ;;
    cuda) echo '{{"install": [{{"metadata": {{"name": "nvidia-cublas"}}}}]}}' >.venv/plan.json ;;
    *) echo '{{"install": [{{"metadata": {{"name": "torch"}}}}]}}' >.venv/plan.json ;;
    esac ;;
"-c import shutil"*) echo "${{FAKE_FREE_MB:-9000}}" ;;
*) exec {sys.executable} "$@" ;;
esac
"""


class Checkout:
    """A folder with scripts/setup, the files it reads, and the pretended Python first in PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "setup", folder / "scripts")
        (folder / "scripts" / "go").write_text('set -euo pipefail\n. "$(dirname "$0")/setup"\necho ready\n')
        for name in ("pyproject.toml", "constraints.txt"):
            (folder / name).write_text(name)
        self.python = folder / "bin" / "python3.11"
        self.python.parent.mkdir()
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def start(self, **behaviour: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PATH": f"{self.python.parent}:{os.environ['PATH']}", "FAKE_PIP": ""}
        return subprocess.Popen(
            ["bash", "scripts/go"],
            cwd=self.folder,
            env=environment | behaviour,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **behaviour: str) -> tuple[int, str, str]:
        process = self.start(**behaviour)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def pip_calls(self) -> list[str]:
        calls = self.folder / "pip-calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_first_run_installs_torch_before_the_package_and_the_second_run_installs_nothing(
    checkout: Checkout,
) -> None:
    status, out, err = checkout.run()
    assert (status, out) == (0, "ready\n"), err
    installs = [call for call in checkout.pip_calls() if "--dry-run" not in call]
    assert installs[0].endswith("-c constraints.txt torch")
    assert installs[1].endswith("-c constraints.txt -e .[dev]")
    num_calls = len(checkout.pip_calls())
    assert checkout.run() == (0, "ready\n", "")
    assert len(checkout.pip_calls()) == num_calls


def test_setup_by_itself_says_how_to_put_the_command_on_the_path(checkout: Checkout) -> None:
    (checkout.folder / "scripts" / "go").write_text("exec bash scripts/setup\n")
    status, out, err = checkout.run()
    assert status == 0, err
    assert f"source {checkout.folder}/.venv/bin/activate" in out
    assert "nemotron4 chat smollm2" in out


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(checkout: Checkout, name: str) -> None:
    checkout.run()
    num_calls = len(checkout.pip_calls())
    (checkout.folder / name).write_text("changed")
    assert checkout.run()[0] == 0
    assert len(checkout.pip_calls()) > num_calls


@pytest.mark.skipif(sys.platform != "linux", reason="only PyPI's torch for Linux brings CUDA")
def test_cuda_build_of_torch_is_refused_before_it_is_downloaded(checkout: Checkout) -> None:
    status, _, err = checkout.run(FAKE_PIP="cuda")
    assert status == 1
    assert "error: pip is about to install the CUDA build of torch" in err
    assert "PIP_EXTRA_INDEX_URL" in err
    assert all("--dry-run" in call for call in checkout.pip_calls())


def test_no_network_is_explained(checkout: Checkout) -> None:
    status, _, err = checkout.run(FAKE_PIP="offline")
    assert status == 1
    assert "No matching distribution found" in err
    assert "hint: check the network" in err


def test_the_installation_says_what_it_does_and_how_far_it_is(checkout: Checkout) -> None:
    (checkout.folder / ".venv").mkdir()
    (checkout.folder / ".venv" / "has-torch").touch()  # so that pip hangs where it installs
    process = checkout.start(FAKE_PIP="hang", SETUP_REPORT_S="0.1")
    assert process.stderr is not None
    told = []
    while "Collecting" not in (line := process.stderr.readline()):
        assert line, told
        told.append(line)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert "about 800 MB to fetch" in told[0]
    assert told[1] == "1 of 2: torch (200 MB to fetch) ...\n"
    assert re.fullmatch(r"  \d+ s, \d+ MB in .venv: Collecting torch\n", line)


def test_pip_s_own_words_are_shown_when_it_fails(checkout: Checkout) -> None:
    status, _, err = checkout.run(FAKE_PIP="broken")
    assert status == 1
    assert "ERROR: the wheel is broken\nerror: pip could not install the packages" in err


def test_full_disk_is_explained_before_anything_is_made(checkout: Checkout) -> None:
    status, _, err = checkout.run(FAKE_FREE_MB="812")
    assert status == 1
    assert "error: 812 MB are free on this disk; the environment needs 3000 MB" in err
    assert not (checkout.folder / ".venv").exists()


def test_missing_python_is_explained(checkout: Checkout) -> None:
    checkout.python.unlink()
    for name in ("bash", "dirname", "cat", "uname"):
        tool = shutil.which(name)
        assert tool is not None
        (checkout.python.parent / name).symlink_to(tool)
    status, _, err = checkout.run(PATH=str(checkout.python.parent))
    assert status == 1
    assert "error: no Python 3.11 or newer" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_installation_leaves_no_pip_behind(checkout: Checkout, number: signal.Signals) -> None:
    process = checkout.start(FAKE_PIP="hang")
    pid_file = checkout.folder / "pip-pid"
    deadline = time.monotonic() + 30
    while not pid_file.exists() or not pid_file.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    while _runs(int(pid_file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
