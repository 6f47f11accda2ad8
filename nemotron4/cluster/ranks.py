"""Which of the processes of a Slurm job serves, and how the others live and die with it.

``srun`` starts one copy for each GPU. The first (node 0, local rank 0) serves; it listens on a lifeline port
before it loads anything. Every other copy connects there and waits: when the leader ends, in whatever way,
the system closes the connection and the copy ends too.
"""

from __future__ import annotations

import contextlib
import re
import socket
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
    """Where the nodes of vLLM meet: beside the lifeline."""
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
