"""Batch scripts for Slurm: one server, a training run on every GPU, shards of synthetic data."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal

from nemotron4.errors import ConfigError

Job = Literal["serve", "train", "synth"]
RENDEZVOUS_PORT = 29500


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What the script asks of Slurm and what it runs there."""

    name: str
    nodes: int = 1
    gpus_per_node: int = 8
    time: str = "4:00:00"
    account: str | None = None
    partition: str | None = None
    output: str = "%x-%j.out"
    container: str | None = None  # an image for srun's --container-image (pyxis)
    mounts: tuple[str, ...] = ()
    python: str = "python3"

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 0:
            raise ConfigError(
                f"nodes is {self.nodes} and gpus_per_node {self.gpus_per_node}; expected 1 and 0 or more"
            )
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise ConfigError(f"time is {self.time!r}; expected minutes, h:mm:ss or days-h:mm:ss")
        for name in ("name", "account", "partition", "output"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.%/+:@-]+", value):
                raise ConfigError(f"{name} is {value!r}; expected letters, digits and . _ - / %")
        if self.mounts and self.container is None:
            raise ConfigError("mounts are given without a container", hint="add --container IMAGE")


def serve_script(job: SlurmJob, arguments: list[str]) -> str:
    """One process on each node, which holds all GPUs of its node; the first serves.

    The server ends with the job, running requests first.
    """
    if job.gpus_per_node < 1 and job.nodes > 1:
        raise ConfigError("serving asks for several nodes without a GPU", hint="use --gpus-per-node 8")
    command = _command(job, ["-m", "nemotron4", "serve", *arguments])
    lines = [
        *_header(job, tasks_per_node=1, extra=["--signal=B:TERM@60"]),
        f"{_srun(job)} {command} &",
        "server=$!",
        # Slurm warns the script a minute before the end; running requests get to finish.
        "trap 'kill -TERM \"$server\"' TERM",
        'wait "$server"',
    ]
    return "\n".join(lines) + "\n"


def train_script(job: SlurmJob, arguments: list[str]) -> str:
    """One launcher on each node, one process for each GPU; requeued runs continue from their checkpoint."""
    if job.gpus_per_node < 1:
        raise ConfigError("training asks for 0 GPUs on a node", hint="use --gpus-per-node 8")
    launcher = [
        "-m",
        "torch.distributed.run",
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={job.gpus_per_node}",
        "--rdzv-backend=c10d",
    ]
    quoted = _command(job, launcher)
    lines = [
        *_header(job, tasks_per_node=1, extra=["--requeue"]),
        # No pipe into head: pipefail would end the job when scontrol is still writing as head leaves.
        'mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        f"{_srun(job)} {quoted} \\",
        f'    --rdzv-endpoint="${{hosts[0]}}:{RENDEZVOUS_PORT}" --rdzv-id="$SLURM_JOB_ID" \\',
        f"    -m nemotron4 train {shlex.join(arguments)}",
    ]
    return "\n".join(lines) + "\n"


def synth_script(job: SlurmJob, recipe: str, out: str, *, shards: int) -> str:
    """An array of independent shards; the last line of the header says how to merge them."""
    if shards < 1 or job.nodes != 1:
        raise ConfigError(f"shards is {shards} and nodes {job.nodes}; expected 1 or more shards of one node")
    command = _command(job, ["-m", "nemotron4", "synth", "run", recipe, "--quiet"])
    folder = shlex.quote(out)
    merge = " ".join(f"{out}/shard-{i}" for i in range(min(shards, 2))) + (" ..." if shards > 2 else "")
    lines = [
        *_header(job, tasks_per_node=1, extra=["--requeue", f"--array=0-{shards - 1}"]),
        f"# When all shards are done: nemotron4 synth merge --out {out}/merged {merge}",
        f"{_srun(job)} {command} \\",
        f'    --out {folder}/shard-"$SLURM_ARRAY_TASK_ID" --shard "$SLURM_ARRAY_TASK_ID"/{shards}',
    ]
    return "\n".join(lines) + "\n"


def submit(script: str) -> str:
    """Hand the script to ``sbatch``; returns what it says (the job's number)."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on this machine", hint="run this on a login node, or leave --submit out"
        )
    done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused the script: {done.stderr.strip()}")
    return done.stdout.strip()


def _header(job: SlurmJob, *, tasks_per_node: int, extra: list[str]) -> list[str]:
    options = [f"--job-name={job.name}", f"--nodes={job.nodes}", f"--ntasks-per-node={tasks_per_node}"]
    options += [f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []
    options += [f"--time={job.time}", f"--output={job.output}"]
    options += [f"--account={job.account}"] if job.account else []
    options += [f"--partition={job.partition}"] if job.partition else []
    return ["#!/bin/bash", *(f"#SBATCH {option}" for option in [*options, *extra]), "set -euo pipefail"]


def _srun(job: SlurmJob) -> str:
    words = ["srun", "--kill-on-bad-exit=1"]
    if job.container is not None:
        words.append(f"--container-image={job.container}")
    if job.mounts:
        words.append(f"--container-mounts={','.join(job.mounts)}")
    return shlex.join(words)


def _command(job: SlurmJob, arguments: list[str]) -> str:
    return shlex.join([job.python, *arguments])
