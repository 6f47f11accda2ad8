"""One run on several processes under ``torchrun``: pipeline, data and tensor axes.

A single process makes no process group and none of this runs. Every process reads all the data and takes its
share of each step's rows, so the position in the data is one number whatever the layout.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemotron4.errors import ConfigError
from nemotron4.training import pipeline, tensor_parallel
from nemotron4.training.engine import Engine
from nemotron4.training.pipeline import PipelineEngine
from nemotron4.training.recipe import ParallelSection
from nemotron4.training.scorer import Scorer
from nemotron4.training.sharded import ShardedEngine, shard

AXES = ("pipeline", "replica", "shard", "tensor")


def num_processes() -> int:
    """What the launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def process_group(settings: ParallelSection, device: torch.device) -> Iterator[DeviceMesh | None]:
    """The mesh of this run, or None for one process; the group is destroyed at the end."""
    launched = num_processes()
    if settings.num_processes != launched:
        raise ConfigError(
            f"parallel data {settings.data} x tensor {settings.tensor} x pipeline {settings.pipeline} = "
            f"{settings.num_processes} processes, but {launched} were launched",
            hint=f"torchrun --nproc-per-node {settings.num_processes} -m nemotron4.cli train ...",
        )
    if launched == 1:
        yield None
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield build_mesh(settings, device.type)
    finally:
        dist.destroy_process_group()


def build_mesh(settings: ParallelSection, device_type: str) -> DeviceMesh:
    """The processes as a grid; ``data`` is replicas and shards together."""
    sizes = (settings.pipeline, settings.replicas, settings.data // settings.replicas, settings.tensor)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
    mesh["replica", "shard"]._flatten("data")
    return mesh


def distribute(scorer: Scorer, mesh: DeviceMesh, device: torch.device) -> Engine:
    """Split a scorer that is whole on every process, and return the engine that runs it."""
    config = scorer.net.config
    if mesh["tensor"].size() > 1:
        tensor_parallel.check_divisible(config, mesh["tensor"].size())
    if mesh["pipeline"].size() > 1:
        pipeline.check_divisible(config, mesh["pipeline"].size())
        return PipelineEngine(scorer, mesh, device=device)
    shard(scorer, list(scorer.net.model.layers), mesh)
    return ShardedEngine(scorer, mesh, device=device)
