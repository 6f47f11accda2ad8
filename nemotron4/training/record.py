"""What a run was made of: the fingerprint that a continuation must have, and the record for people."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path

import torch

from nemotron4 import __version__
from nemotron4.training import data
from nemotron4.training.inputs import Data
from nemotron4.training.reading import files_of
from nemotron4.training.recipe import Recipe, as_plain
from nemotron4.training.trainer import Trainer

RECORD_FILE = "run.json"


def fingerprint(recipe: Recipe, samples: Data, weights: str) -> str:
    """Changes with anything that changes the loss curve; not with the layout or the length of the run."""
    plain = as_plain(recipe)
    for name in ("run", "parallel", "samples"):
        plain.pop(name, None)
    plain["seed"] = recipe.run.seed
    texts = [json.dumps(plain, sort_keys=True), weights]
    texts += [data.fingerprint(samples.train), data.fingerprint(samples.validation)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


def write_record(recipe: Recipe, read: Data, trainer: Trainer, weights: str) -> None:
    """The resolved recipe, and what it was run with."""
    folder = recipe.run.directory
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "recipe": as_plain(recipe),
        "fingerprint": trainer.fingerprint,
        "start_weights": weights,
        "num_steps": trainer.plan.num_steps,
        "num_samples": len(read.train),
        "num_rows_left_out": len(read.problems),
        "inputs": {
            str(file): _file_hash(file)
            for path in (*recipe.data.train, *recipe.data.validation)
            for file in files_of(path)
        },
        "versions": {
            "nemotron4": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": _commit(),
        },
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit() -> str | None:
    """The commit of the package's own checkout, if it is one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
