"""One run on several processes under ``torchrun``: pipeline, data and tensor axes.

A single process makes no process group and none of this runs. Every process reads all the data and takes its
share of each step's rows, so the position in the data is one number whatever the layout.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nemotron4.errors import ConfigError
from nemotron4.training import pipeline, sharded
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.loading import Origin, fill
from nemotron4.training.pipeline import PipelineEngine
from nemotron4.training.recipe import ParallelSection
from nemotron4.training.scorer import Scorer
from nemotron4.training.sharded import Grid, ShardedEngine, shard

AXES = ("pipeline", "replica", "shard", "tensor")


def num_processes() -> int:
    """What the launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def process_group(settings: ParallelSection, device: torch.device) -> Iterator[Grid | None]:
    """The processes of this run. None for one process."""
    launched = num_processes()
    if settings.num_processes != launched:
        raise ConfigError(
            f"parallel data {settings.data} x tensor {settings.tensor} x pipeline {settings.pipeline} = "
            f"{settings.num_processes} processes, but {launched} were launched",
            hint=f"torchrun --nproc-per-node {settings.num_processes} -m nemotron4 train ...",
        )
    if launched == 1:
        yield None
        return
    with launch(device):
        yield build_grid(settings, device.type)


@contextlib.contextmanager
def launch(device: torch.device) -> Iterator[None]:
    """What the launcher started, joined once: the runs within share it, as the stages of a chain do.

    A second group of the same launch would find the keys of the first in the launcher's store, and wait.
    """
    if num_processes() == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(_backend(device))
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """True on the process that writes what a run leaves."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def wait_for_all() -> None:
    """Until every process is here, however long one of them writes."""
    dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=1)))


def build_grid(settings: ParallelSection, device_type: str) -> Grid:
    """The axes of a launch: neighbours in the order of ranks share a tensor axis first."""
    sizes = (settings.pipeline, settings.replicas, settings.data // settings.replicas, settings.tensor)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=AXES)
    data = mesh["replica", "shard"]._flatten("data")
    return Grid(mesh, mesh["pipeline"], data, mesh["tensor"])


def build(
    origin: Origin, grid: Grid | None, device: torch.device, *, is_frozen: bool = False
) -> TrainingEngine:
    """The engine of a recipe's model; each process reads only its own parts of the weights."""
    scorer = origin.scorer()
    if is_frozen:
        scorer.requires_grad_(False)
    engine = distribute(scorer, grid, device, compute=origin.compute)
    fill(engine.scorer.net, origin.sources(), device)
    return engine


def distribute(
    scorer: Scorer, grid: Grid | None, device: torch.device, *, compute: torch.dtype = torch.float32
) -> TrainingEngine:
    """Split a scorer, alike on every process or on the meta device, and return the engine that runs it."""
    if grid is None:
        return TrainingEngine(scorer, device=device, compute=compute)
    config = scorer.net.config
    if grid.tensor.size() > 1:
        sharded.check_divisible(config, grid.tensor.size())
    if grid.pipeline.size() > 1:
        pipeline.check_divisible(config, grid.pipeline.size())
        return PipelineEngine(scorer, grid, device=device, compute=compute)
    shard(scorer, scorer, grid, compute)
    return ShardedEngine(scorer, grid, device=device)
