"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins`` in pyproject.toml).

It makes the process die with the one that started it, and teaches it to read the checkpoints of this
package. Nothing of vLLM is imported before vLLM asks.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "nemotron4"
LOAD_FORMAT = "nemotron4"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def register() -> None:
    """Called once in the leader, in the engine's process and in every worker."""
    _die_with_parent()
    from vllm.model_executor.model_loader import register_model_loader

    from nemotron4.inference.vllm_loader import CheckpointLoader

    register_model_loader(LOAD_FORMAT)(CheckpointLoader)


def _die_with_parent() -> None:
    """After kill -9 of the server nothing else would tell its helpers. The server itself is left alone."""
    parent = multiprocessing.parent_process()
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)
