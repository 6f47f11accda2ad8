"""Jobs on Slurm: batch scripts, and which of a job's processes serves.

Batch scripts: one server, a training run on every GPU, shards of synthetic data.

``srun`` starts one copy for each GPU. The first (node 0, local rank 0) serves; it listens on a lifeline port
before it loads anything. Every other copy connects there and waits: when the leader ends, in whatever way,
the system closes the connection and the copy ends too.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nemotron4.errors import ConfigError

LIFELINE_OFFSET = 10000
CONNECT_S = 600.0
RETRY_S = 0.2


@dataclass(frozen=True)
class Rank:
    """This process among those of the job. Outside Slurm there is one."""

    node: int
    local_rank: int
    num_tasks: int
    num_nodes: int
    leader_host: str

    @property
    def is_leader(self) -> bool:
        return self.node == 0 and self.local_rank == 0


def find_rank(environment: Mapping[str, str]) -> Rank:
    """Read Slurm's variables; ``MASTER_ADDR`` names the leader's host if Slurm's node list does not do.

    Without Slurm, ``NODE_RANK`` numbers the node, as torchrun has it.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    host = environment.get("MASTER_ADDR") or (first_host(nodes) if nodes else "127.0.0.1")
    return Rank(
        node=_number(environment, "SLURM_NODEID", _number(environment, "NODE_RANK", 0)),
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        num_tasks=_number(environment, "SLURM_NTASKS", 1),
        num_nodes=_number(environment, "SLURM_NNODES", 1),
        leader_host=host,
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if text and not text.isdigit():
        raise ConfigError(f"{name} is {text!r}; expected a number")
    return int(text) if text else default


def first_host(nodes: str) -> str:
    """First name of a Slurm node list: ``gpu[003-004,9],login`` is gpu003."""
    match = re.match(r"([^,\[]*)(?:\[([^\]]*)\])?([^,]*)", nodes)
    assert match is not None
    prefix, numbers, suffix = match.groups()
    number = re.split(r"[-,]", numbers)[0] if numbers else ""
    return f"{prefix}{number}{suffix}"


def lifeline_port(port: int) -> int:
    """The port that belongs to a server port; the same on every rank."""
    return port + LIFELINE_OFFSET if port + LIFELINE_OFFSET < 65536 else port - LIFELINE_OFFSET


def rendezvous_port(port: int) -> int:
    """Where the nodes of vLLM meet: next to the lifeline."""
    return lifeline_port(port) + 1


@contextlib.contextmanager
def held_lifeline(rank: Rank, port: int, *, nodes: int = 1) -> Iterator[None]:
    """Let the other ranks connect while the block runs. Nothing is read from them.

    ``nodes`` counts those of a server outside Slurm, whose variables then do not.
    """
    if rank.num_tasks == 1 and nodes == 1:
        yield
        return
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("0.0.0.0" if max(rank.num_nodes, nodes) > 1 else "127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"the lifeline port {port} cannot be bound: {error.strerror}") from error
    listener.listen(1024)
    connected: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connected.append(listener.accept()[0])

    accepting = threading.Thread(target=accept, name="lifeline", daemon=True)
    accepting.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        accepting.join()  # it may be taking one more connection
        listener.close()
        for connection in connected:
            connection.close()


def wait_for_leader_to_end(rank: Rank, port: int, *, connect_s: float = CONNECT_S) -> None:
    """Return when the leader is gone. ConfigError if it was never there."""
    deadline = time.monotonic() + connect_s
    while True:
        try:
            connection = socket.create_connection((rank.leader_host, port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"no leader on {rank.leader_host}:{port} within {connect_s:.0f} s: {error}",
                    hint="look at the output of node 0, local rank 0",
                ) from error
            time.sleep(RETRY_S)
    with connection:
        connection.settimeout(None)
        # A node that loses power sends no farewell; the system notices after a minute.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        with contextlib.suppress(OSError):
            connection.recv(1)


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
        # Slurm warns the script a minute before the end; running requests get to finish. A trap ends the wait
        # below, and with the script Slurm would end the server: so it waits itself.
        'trap \'kill -TERM "$server"; wait "$server"\' TERM',
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


def stage_script(job: SlurmJob, serve: list[str], commands: list[list[str]], *, health: str) -> str:
    """Commands one after the other on the first node; ``serve`` has a server on all nodes meanwhile."""
    lines = _header(job, tasks_per_node=1, extra=["--requeue"])
    if serve:
        lines += [
            f"{_srun(job)} {_command(job, ['-m', 'nemotron4', *serve])} &",
            "server=$!",
            f'until curl -sf {health} >/dev/null; do kill -0 "$server"; sleep 10; done',
        ]
    lines += [_command(job, ["-m", "nemotron4", *command]) for command in commands]
    if serve:
        lines += ['kill -TERM "$server"', 'wait "$server" || true']
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
