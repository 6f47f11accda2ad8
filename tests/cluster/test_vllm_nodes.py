"""The card's command line on vLLM over two nodes, which are processes of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import requests

from nemotron4.inference.load import load
from nemotron4.inference.vllm_load import is_installed
from tests.tiny_models import nemotron_directory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="vLLM is not installed here: see scripts/vllm-env"),
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("default"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.2)


def descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found.update(new)
        waiting += new
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_first_rank_of_each_node_joins_the_others_wait_and_all_die_with_the_leader(
    tmp_path: Path,
) -> None:
    model = nemotron_directory(tmp_path / "m", num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    port = free_port()
    command = [sys.executable, "-m", "nemotron4.cli.megatron_gpt_eval", f"gpt_model_file={model}"]
    command += [
        "server=True",
        f"port={port}",
        "tensor_model_parallel_size=2",
        "pipeline_model_parallel_size=1",
    ]
    command += ["trainer.devices=1", "trainer.num_nodes=2", "+engine=vllm"]
    job = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [(node, local) for node in range(2) for local in range(2)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | job | {"SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)},
        )
        for node, local in ranks
    ]
    try:
        wait_until(lambda: is_listening(port) or processes[0].poll() is not None, seconds=600)
        body = {"sentences": ["Shall I"], "tokens_to_generate": 8, "greedy": True}
        answer = requests.put(f"http://127.0.0.1:{port}/generate", json=body, timeout=120).json()
        with load(model) as engine:
            [wanted] = engine.generate(["Shall I"], max_new_tokens=8, temperature=0, stop_token_ids=[3])
        assert tuple(answer["token_ids"][0][-len(wanted.token_ids) :]) == wanted.token_ids
        helpers = [descendants(process.pid) for process in processes]
        assert [bool(found) for found in helpers] == [True, False, True, False]
        processes[0].send_signal(signal.SIGKILL)
        assert [process.wait(timeout=20) for process in processes[1:]] == [0, 0, 0]
        everyone = set().union(*helpers)
        wait_until(lambda: not any(map(is_alive, everyone)), seconds=20)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def is_listening(port: int) -> bool:
    try:
        requests.put(f"http://127.0.0.1:{port}/", timeout=5)
    except requests.ConnectionError:
        return False
    return True
