"""Python modules on one process or on several, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(*module: str, processes: int = 1) -> list[str]:
    """``-m MODULE ARGUMENT ...``, behind torchrun where there are several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), "-m", *module]


def run_train(recipe: Path, *settings: str, processes: int = 1) -> str:
    """``nemotron4 train`` to its end; what it wrote to stderr."""
    process = subprocess.run(
        command("nemotron4", "train", str(recipe), *settings, processes=processes),
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=140,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-6000:]
    assert "Warning" not in process.stderr
    return process.stderr
