"""Data and tensor axes: every process runs the whole forward pass on its own rows (FSDP2, DTensor)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from nemotron4.model.transformer import Block
from nemotron4.training import tensor_parallel
from nemotron4.training.engine import Engine, Sums, T
from nemotron4.training.packing import PackedRow, Sample, pack, plan_rows
from nemotron4.training.scorer import Scorer
from nemotron4.training.stages.interface import Stage


@dataclass(frozen=True)
class Grid:
    """The processes of a run. ``pipeline``, ``data`` and ``tensor`` are this process's rows of the grid."""

    mesh: DeviceMesh  # axes pipeline, replica, shard, tensor
    pipeline: DeviceMesh
    data: DeviceMesh  # replicas and shards together
    tensor: DeviceMesh

    @property
    def fsdp(self) -> DeviceMesh:
        """What FSDP2 works on: the shards, or replicas and shards."""
        return self.mesh["replica", "shard"] if self.mesh["replica"].size() > 1 else self.mesh["shard"]


def shard(
    root: nn.Module,
    scorer: Scorer,
    grid: Grid,
    compute: torch.dtype,
    *,
    keeps_gathered: bool = False,
) -> None:
    """Tensor parallel first, then FSDP2 over the data axis: each block of the scorer, the rest with the root.

    With replicas the weights are sharded within each and gradients are summed over them (HSDP). FSDP2 also
    makes the copies in the type of ``compute``; a reward head stays float32. ``keeps_gathered``: weights stay
    gathered from the first micro-batch of a step to its last.
    """
    if grid.tensor.size() > 1:
        tensor_parallel.shard(root, grid.tensor)
    is_mixed = compute != torch.float32
    if grid.data.size() == 1 and not is_mixed:
        return
    policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32) if is_mixed else MixedPrecisionPolicy()
    # The root too: its weights must be sharded again after a pass without gradients, or an optimiser or
    # a checkpoint made next would take the gathered copies for the parameters.
    for module in (*_blocks(scorer), *_heads(scorer), root):
        own = MixedPrecisionPolicy() if module in _heads(scorer) else policy
        fully_shard(module, mesh=grid.fsdp, reshard_after_forward=not keeps_gathered, mp_policy=own)


def _blocks(scorer: Scorer) -> list[nn.Module]:
    return [block for block in scorer.net.model.layers if isinstance(block, Block)]


def _heads(scorer: Scorer) -> list[nn.Module]:
    return [module for name, module in scorer.net.named_children() if name == "reward_head"]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that other processes of its mesh have."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ShardedEngine(Engine):
    """Several processes with data and tensor axes. The pipeline's engine builds on this one."""

    def __init__(self, scorer: Scorer, grid: Grid, *, device: torch.device | str = "cpu") -> None:
        super().__init__(scorer, device=device)
        self.grid = grid
        self.num_data = grid.data.size()
        self.data_rank = grid.data.get_local_rank()

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
        dist.all_reduce(tensor, group=self.grid.data.get_group())
        added: list[float] = tensor.tolist()
        return added

    def any_process(self, flag: bool) -> bool:
        tensor = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return bool(tensor)

    def gathered(self, value: T) -> list[T]:
        values = [value] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values

    def share(self, jobs: Sequence[T]) -> Sequence[T]:
        return jobs[dist.get_rank() :: dist.get_world_size()]

    def whole_tensors(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors.items():
            yield name, whole(tensor)

    def _backward(self, rows: Sequence[PackedRow], stage: Stage, count: float) -> Sums:
        sums = super()._backward(rows, stage, count)
        tensor_parallel.settle_gradients(self.trainable)
        return sums

    def _scaled_for_backward(self, loss: Tensor) -> Tensor:
        # FSDP averages gradients over the data axis; the loss law has divided already.
        return loss * self.num_data

    def grad_norm(self) -> float:
        return tensor_parallel.total_norm([p.grad for p in self.trainable.values() if p.grad is not None])
