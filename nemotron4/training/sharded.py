"""Data and tensor axes: every process runs the whole forward pass on its own rows (FSDP2, DTensor)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from nemotron4.training import tensor_parallel
from nemotron4.training.engine import Engine, Sums
from nemotron4.training.packing import PackedRow, Sample, pack, plan_rows
from nemotron4.training.scorer import Scorer
from nemotron4.training.stages.interface import Stage


def shard(
    root: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, *, keeps_gathered: bool = False
) -> None:
    """Tensor parallel first, then FSDP2 over the data axis: each block, and the rest with the root.

    With replicas the weights are sharded within each and gradients are summed over them (HSDP).
    ``keeps_gathered``: weights stay gathered from the first micro-batch of a step to its last.
    """
    if mesh["tensor"].size() > 1:
        tensor_parallel.shard(root, mesh["tensor"])
    if mesh["data"].size() == 1:
        return
    data = mesh["replica", "shard"] if mesh["replica"].size() > 1 else mesh["shard"]
    # The root too: its weights must be sharded again after a pass without gradients, or an optimiser or
    # a checkpoint made next would take the gathered copies for the parameters.
    for module in (*blocks, root):
        fully_shard(module, mesh=data, reshard_after_forward=not keeps_gathered)


class ShardedEngine(Engine):
    """Several processes with data and tensor axes. The pipeline's engine builds on this one."""

    def __init__(self, scorer: Scorer, mesh: DeviceMesh, *, device: torch.device | str = "cpu") -> None:
        super().__init__(scorer, device=device)
        self.mesh = mesh
        self.num_data = mesh["data"].size()
        self.data_rank = mesh["data"].get_local_rank()

    def rows(self, samples: Sequence[Sample], row_tokens: int) -> list[PackedRow]:
        """Every data rank gets equally many rows, because sharded layers work in step; some may be empty."""
        plan = plan_rows([sample.num_tokens for sample in samples], row_tokens)
        plan += [[] for _ in range(-len(plan) % self.num_data)]
        return self._packed(samples, plan, pad_to=None)

    def _packed(
        self, samples: Sequence[Sample], plan: Sequence[Sequence[int]], *, pad_to: int | None
    ) -> list[PackedRow]:
        """This data rank's rows of the plan; an empty row is padding alone."""
        mine = plan[self.data_rank :: self.num_data]
        return [
            pack([samples[i] for i in row], pad_to=pad_to or (None if row else 2)).to(self.device)
            for row in mine
        ]

    def add_up(self, values: Sequence[float]) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, group=self.mesh["data"].get_group())
        added: list[float] = tensor.tolist()
        return added

    def any_process(self, flag: bool) -> bool:
        tensor = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return bool(tensor)

    def gather_texts(self, texts: Sequence[str]) -> list[str]:
        gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, list(texts))
        return [text for part in gathered for text in part]

    def _backward(self, rows: Sequence[PackedRow], stage: Stage, count: float) -> Sums:
        sums = super()._backward(rows, stage, count)
        tensor_parallel.settle_gradients(self.trainable)
        return sums

    def _scaled_for_backward(self, loss: torch.Tensor) -> torch.Tensor:
        # FSDP averages gradients over the data axis; the loss law has divided already.
        return loss * self.num_data

    def grad_norm(self) -> float:
        return tensor_parallel.total_norm([p.grad for p in self.trainable.values() if p.grad is not None])
