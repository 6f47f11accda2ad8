"""Which engine a server runs, and what the other processes of its job do meanwhile."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nemotron4.cli.console import note, show_notes
from nemotron4.cluster.slurm import (
    Rank,
    held_lifeline,
    lifeline_port,
    rendezvous_port,
    wait_for_leader_to_end,
)
from nemotron4.errors import ConfigError, Nemotron4Error

if TYPE_CHECKING:
    from nemotron4.engine import InferenceEngine
    from nemotron4.inference.vllm_load import Layout

EngineName = Literal["builtin", "vllm"]


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How many devices share a model, on how many nodes."""

    tensor: int = 1
    pipeline: int = 1
    nodes: int = 1

    def require_one_device(self) -> None:
        """For the built-in engine."""
        if max(self.tensor, self.pipeline, self.nodes) > 1:
            raise ConfigError(
                f"tensor_parallel is {self.tensor}, pipeline_parallel {self.pipeline}, nodes {self.nodes}; "
                "the built-in engine runs on one device",
                hint="add --engine vllm",
            )


def run_vllm(
    model: str,
    rank: Rank,
    parallel: Parallel,
    lead: Callable[[Callable[[], InferenceEngine]], None],
    *,
    port: int,
    max_waiting: int = 1024,
    start_timeout_s: float | None = None,
    chat_template: str | None = None,
    **options: Any,
) -> int:
    """This process's part in a vLLM server of the whole job; returns the exit status.

    The leader calls ``lead`` with what loads the engine. The first process of each other node lends its
    devices, all others wait, and all end with the leader. ``port`` is the server's and fixes two more.
    """
    from nemotron4.inference.vllm_load import join_vllm, load_vllm

    layout = _layout(rank, parallel, port)
    if not rank.is_leader:
        is_first = rank.local_rank == 0 and parallel.nodes > 1
        join = (lambda: join_vllm(model, layout, **options)) if is_first else None
        return follow(rank, lifeline_port(port), join)

    def load() -> InferenceEngine:
        engine = load_vllm(
            model,
            layout,
            max_waiting=max_waiting,
            start_timeout_s=start_timeout_s,
            chat_template=chat_template,
            **options,
        )
        show_notes(engine.info)
        return engine

    with held_lifeline(rank, lifeline_port(port), nodes=parallel.nodes):
        lead(load)
    return 0


def _layout(rank: Rank, parallel: Parallel, port: int) -> Layout:
    from nemotron4.inference.vllm_load import Layout

    if parallel.nodes > 1 and port == 0:
        raise ConfigError("port is 0, but several nodes must know it beforehand", hint="choose one")
    if rank.num_nodes not in (1, parallel.nodes):
        raise ConfigError(
            f"{parallel.nodes} nodes are asked for, but the job has {rank.num_nodes}",
            hint=f"--nodes {rank.num_nodes}",
        )
    if rank.node >= parallel.nodes:
        raise ConfigError(f"this is node {rank.node}; {parallel.nodes} nodes count from 0")
    return Layout(
        tensor_parallel=parallel.tensor,
        pipeline_parallel=parallel.pipeline,
        nodes=parallel.nodes,
        node_rank=rank.node,
        leader_host=rank.leader_host,
        leader_port=rendezvous_port(port),
    )


def follow(rank: Rank, lifeline: int, join: Callable[[], None] | None = None) -> int:
    """Live as long as the leader; ``join`` lends this node's devices to it meanwhile.

    The exit status is 0 when the leader has ended and 1 when this node's part has, which makes Slurm end
    the job (``srun --kill-on-bad-exit``).
    """
    if join is None:
        note(f"node {rank.node}, local rank {rank.local_rank}: waits for node 0, local rank 0")
        wait_for_leader_to_end(rank, lifeline)
        return 0

    def watch() -> None:
        status = 0
        try:
            wait_for_leader_to_end(rank, lifeline)
        except Nemotron4Error as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            status = 1
        os._exit(status)  # vLLM's workers end with this process, and there is nothing to save

    note(f"node {rank.node}: its devices join the engine of {rank.leader_host}")
    threading.Thread(target=watch, name="lifeline", daemon=True).start()
    join()
    note(f"node {rank.node}: a worker has ended, and this node with it")
    return 1
