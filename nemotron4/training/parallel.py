"""One run on several processes: data (FSDP2) and tensor (DTensor) axes under ``torchrun``.

A single process makes no process group and none of this runs. Every process reads all the data and takes its
share of each step's rows, so the position in the data is one number whatever the layout.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from nemotron4.errors import ConfigError
from nemotron4.training import tensor_parallel
from nemotron4.training.engine import Engine, StepResult
from nemotron4.training.packing import PackedRow, Sample, pack, plan_rows
from nemotron4.training.recipe import ParallelSection
from nemotron4.training.scorer import Scorer
from nemotron4.training.stages.interface import Stage

AXES = ("pipeline", "data", "tensor")


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
        sizes = (settings.pipeline, settings.data, settings.tensor)
        yield init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    finally:
        dist.destroy_process_group()


def distribute(scorer: Scorer, mesh: DeviceMesh, device: torch.device) -> Engine:
    """Split a scorer that is whole on every process, and return the engine that runs it."""
    if mesh["tensor"].size() > 1:
        tensor_parallel.check_divisible(scorer.net.config, mesh["tensor"].size())
    if mesh["pipeline"].size() > 1:
        raise ConfigError(
            "parallel.pipeline is not available in this version", hint="use parallel.data and parallel.tensor"
        )
    shard(scorer, list(scorer.net.model.layers), mesh)
    return ShardedEngine(scorer, mesh, device=device)


def shard(root: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Tensor parallel first, then FSDP2 over the data axis: each block, and the rest with the root."""
    if mesh["tensor"].size() > 1:
        tensor_parallel.shard(root, mesh["tensor"])
    if mesh["data"].size() > 1:
        for block in blocks:
            fully_shard(block, mesh=mesh["data"])
        # The root too: its weights must be sharded again after a pass without gradients, or an optimiser or
        # a checkpoint made next would take the gathered copies for the parameters.
        fully_shard(root, mesh=mesh["data"], reshard_after_forward=True)


class ShardedEngine(Engine):
    """Data and tensor axes: every process runs the whole model's forward pass on its own rows."""

    def __init__(self, scorer: Scorer, mesh: DeviceMesh, *, device: torch.device | str = "cpu") -> None:
        super().__init__(scorer, device=device)
        self.mesh = mesh
        self.num_data = mesh["data"].size()
        self.data_rank = mesh["data"].get_local_rank()

    def rows(self, samples: Sequence[Sample], row_tokens: int) -> list[PackedRow]:
        """Every data rank gets equally many rows, because sharded layers work in step; some may be empty."""
        plan = plan_rows([sample.num_tokens for sample in samples], row_tokens)
        plan += [[] for _ in range(-len(plan) % self.num_data)]
        mine = plan[self.data_rank :: self.num_data]
        return [self._pack([samples[i] for i in row]).to(self.device) for row in mine]

    def _pack(self, samples: Sequence[Sample]) -> PackedRow:
        return pack(samples, pad_to=None if samples else 2)

    def add_up(self, values: Sequence[float]) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, group=self.mesh["data"].get_group())
        added: list[float] = tensor.tolist()
        return added

    def forward_backward(self, rows: Sequence[PackedRow], stage: Stage) -> StepResult:
        result = super().forward_backward(rows, stage)
        tensor_parallel.settle_gradients(self.trainable)
        return result

    def _scaled_for_backward(self, loss: torch.Tensor) -> torch.Tensor:
        # FSDP averages gradients over the data axis; the loss law has divided already.
        return loss * self.num_data

    def grad_norm(self) -> float:
        return tensor_parallel.total_norm([p.grad for p in self.trainable.values() if p.grad is not None])
