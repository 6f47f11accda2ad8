"""What vLLM calls in each of its processes, without vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

PARENT = """
import multiprocessing, threading, time
from nemotron4.inference.vllm_plugin import _die_with_parent

def child():
    _die_with_parent()
    print(multiprocessing.current_process().pid, flush=True)
    time.sleep(60)

if __name__ == "__main__":
    def start():
        multiprocessing.get_context("fork").Process(target=child).start()
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()  # the thread that started the child is gone from here on
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_worker_dies_with_its_parent_and_not_with_the_thread_that_started_it() -> None:
    command = [sys.executable, "-W", "ignore", "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(next(line for line in parent.stdout if line.strip().isdigit()))
        time.sleep(0.2)
        assert _is_alive(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + 10
        while _is_alive(child) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not _is_alive(child)


def _is_alive(pid: int) -> bool:
    """A process that has ended and waits for its parent to look counts as ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
    except ProcessLookupError:
        return False


def test_this_process_is_left_alone() -> None:
    from nemotron4.inference.vllm_plugin import _die_with_parent

    _die_with_parent()  # no process of multiprocessing
    assert os.getpid()
