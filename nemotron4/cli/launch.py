"""``nemotron4 launch``: the model card's job on this package."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nemotron4.cli.console import group, note
from nemotron4.errors import ConfigError

app = group("Start jobs on a cluster, and the model card's own scripts.")

SHIM_PATH = "examples/nlp/language_modeling/megatron_gpt_eval.py"
SHIM = '''"""Stands in for NeMo's megatron_gpt_eval.py; written by `nemotron4 launch install-shim`.

It becomes the server: exec keeps the process that the calling script started and will kill.
"""

import os
import sys

PYTHON = {python!r}

os.execv(PYTHON, [PYTHON, "-m", "nemotron4.cli.megatron_gpt_eval", *sys.argv[1:]])
'''


@app.callback()
def launch() -> None:
    """Start jobs on a cluster, and the model card's own scripts."""


@app.command("install-shim")
def install_shim(
    prefix: Annotated[Path, typer.Option(help="Where the card's script looks for NeMo.")] = Path("/opt/NeMo"),
) -> None:
    """Write megatron_gpt_eval.py where the card's nemo_inference.sh calls it."""
    path = prefix / SHIM_PATH
    if path.exists() and "nemotron4" not in path.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(
            f"{path}: is there and was not written by nemotron4",
            hint="give another --prefix, or move that NeMo away",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        partial.write_text(SHIM.format(python=sys.executable), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}", hint="run as a user who may, or give --prefix"
        ) from error
    print(path)
    note("the card's nemo_inference.sh ends in `pkill python`, which kills every python of the user there;")
    note("outside a container run it as: unshare -r --pid --fork --mount-proc bash nemo_inference.sh MODEL")
