"""Who serves, who waits, and what happens when the leader dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from nemotron4.cluster.slurm import (
    Rank,
    find_rank,
    first_host,
    held_lifeline,
    lifeline_port,
    wait_for_leader_to_end,
)
from nemotron4.errors import ConfigError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[003-004,9],login", "gpu003"),
        ("node1", "node1"),
        ("a,b", "a"),
        ("rack2-n[7]-ib", "rack2-n7-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_outside_slurm_there_is_one_process_and_it_leads() -> None:
    rank = find_rank({})
    assert rank.is_leader
    assert rank.num_tasks == 1


def test_only_the_first_rank_of_the_first_node_leads() -> None:
    job = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_STEP_NODELIST": "gpu[1-2]"}
    ranks = [
        find_rank(job | {"SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)})
        for node in range(2)
        for local in range(8)
    ]
    assert [rank.is_leader for rank in ranks] == [True] + [False] * 15
    assert {rank.leader_host for rank in ranks} == {"gpu1"}


def test_without_slurm_the_node_is_numbered_as_torchrun_does() -> None:
    rank = find_rank({"NODE_RANK": "1", "MASTER_ADDR": "node0"})
    assert (rank.node, rank.leader_host, rank.is_leader) == (1, "node0", False)


def test_a_variable_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="SLURM_NODEID is 'x'"):
        find_rank({"SLURM_NODEID": "x"})


def test_the_lifeline_port_stays_in_range() -> None:
    assert lifeline_port(1424) == 11424
    assert lifeline_port(60000) == 50000


LEADER = """
import sys, time
from nemotron4.cluster.slurm import Rank, held_lifeline
with held_lifeline(Rank(0, 0, 4, 1, "127.0.0.1"), int(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
FOLLOWER = """
import sys
from nemotron4.cluster.slurm import Rank, wait_for_leader_to_end
wait_for_leader_to_end(Rank(0, 1, 4, 1, "127.0.0.1"), int(sys.argv[1]), connect_s=30)
"""


def start(script: str, port: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(port)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_followers_end_when_the_leader_is_killed() -> None:
    port = free_port()
    followers = [start(FOLLOWER, port) for _ in range(3)]
    leader = start(LEADER, port)
    try:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "held\n"
        time.sleep(0.5)
        assert [process.poll() for process in followers] == [None] * 3
        leader.send_signal(signal.SIGKILL)
        assert [process.wait(timeout=20) for process in followers] == [0] * 3
    finally:
        for process in (leader, *followers):
            process.kill()
            process.communicate()


def test_a_follower_gives_up_on_a_leader_that_never_comes() -> None:
    with pytest.raises(ConfigError, match=r"no leader on 127\.0\.0\.1"):
        wait_for_leader_to_end(Rank(0, 1, 2, 1, "127.0.0.1"), free_port(), connect_s=0)


def test_the_leader_of_several_nodes_opens_one_without_slurm_too() -> None:
    port = free_port()
    with held_lifeline(Rank(0, 0, 1, 1, "127.0.0.1"), port, nodes=2):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_a_single_process_opens_no_lifeline() -> None:
    port = free_port()
    with held_lifeline(Rank(0, 0, 1, 1, "127.0.0.1"), port), pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
