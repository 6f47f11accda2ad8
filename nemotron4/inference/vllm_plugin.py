"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins`` in pyproject.toml).

It makes the process die with the one that started it, and teaches it to read the checkpoints of this
package. Nothing of vLLM is imported before vLLM asks.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
import threading

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "nemotron4"
LOAD_FORMAT = "nemotron4"


def register() -> None:
    """Called once in the leader, in the engine's process and in every worker."""
    _die_with_parent()
    from vllm.model_executor.model_loader import register_model_loader

    from nemotron4.inference.vllm_loader import CheckpointLoader

    register_model_loader(LOAD_FORMAT)(CheckpointLoader)


def _die_with_parent() -> None:
    """After kill -9 of the server nothing else would tell its helpers. The server itself is left alone.

    A thread waits for the parent process to end. The system's own signal (PR_SET_PDEATHSIG) would come when
    the parent's *thread* that started this process ends, which may be long before.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None or not sys.platform.startswith("linux"):
        return
    try:
        descriptor = os.pidfd_open(parent.pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return

    def wait() -> None:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="nemotron4-parent", daemon=True).start()
    if os.getppid() != parent.pid:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)
