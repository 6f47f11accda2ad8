"""Data and tensor axes: every process runs the whole forward pass on its own rows (FSDP2, DTensor)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from nemotron4.errors import ConfigError
from nemotron4.model.adapters import BottleneckLinear, LoraLinear, PromptEmbedding
from nemotron4.model.config import ModelConfig
from nemotron4.model.transformer import Block
from nemotron4.training.engine import Sums, T, TrainingEngine
from nemotron4.training.packing import PackedRow, pack, plan_rows
from nemotron4.training.samples import Sample
from nemotron4.training.scorer import Scorer, heads
from nemotron4.training.stage import Objective


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
        split_tensors(root, grid.tensor)
    is_mixed = compute != torch.float32
    if grid.data.size() == 1 and not is_mixed:
        return
    policy = MixedPrecisionPolicy(compute, reduce_dtype=torch.float32) if is_mixed else MixedPrecisionPolicy()
    # The root too: its weights must be sharded again after a pass without gradients, or an optimiser or
    # a checkpoint made next would take the gathered copies for the parameters.
    for module in (*_blocks(scorer), *heads(scorer), root):
        own = MixedPrecisionPolicy() if module in heads(scorer) else policy
        fully_shard(module, mesh=grid.fsdp, reshard_after_forward=not keeps_gathered, mp_policy=own)


def _blocks(scorer: Scorer) -> list[nn.Module]:
    return [block for block in scorer.net.model.layers if isinstance(block, Block)]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts that other processes of its mesh have."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ShardedEngine(TrainingEngine):
    """Several processes with data and tensor axes. The pipeline's engine builds on this one."""

    def __init__(self, scorer: Scorer, grid: Grid, *, device: torch.device | str = "cpu") -> None:
        super().__init__(scorer, device=device)
        self.grid = grid
        self.num_data = grid.data.size()
        self.data_rank = grid.data.get_local_rank()

    def rows(self, samples: Sequence[Sample], row_tokens: int) -> list[PackedRow]:
        """Every data rank gets equally many rows, because sharded layers work in step; some may be empty."""
        plan = plan_rows([sample.packed_tokens for sample in samples], row_tokens)
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

    def _backward(self, rows: Sequence[PackedRow], objective: Objective, count: float) -> Sums:
        sums = super()._backward(rows, objective, count)
        settle_gradients(self.trainable)
        return sums

    def _scaled_for_backward(self, loss: Tensor) -> Tensor:
        # FSDP averages gradients over the data axis; the loss law has divided already.
        return loss * self.num_data

    def grad_norm(self) -> float:
        return total_norm([p.grad for p in self.trainable.values() if p.grad is not None])


# ---- the tensor axis
#
# Column-parallel layers (q, k, v, gate, up) split their outputs, row-parallel ones (o, down) their inputs;
# the embedding and the output layer split the vocabulary; norms and the reward head are kept whole. LoRA's A
# and B follow their base layer: column: A whole, B split by rows; row: A split by columns, B whole.

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")


def check_divisible(config: ModelConfig, size: int) -> None:
    """ConfigError if heads, feed-forward rows or vocabulary do not split evenly."""
    for name in ("num_kv_heads", "ffn_hidden_size", "vocab_size"):
        value = getattr(config, name)
        if value % size:
            divisors = [
                n
                for n in range(1, size + 1)
                if all(
                    getattr(config, other) % n == 0
                    for other in ("num_kv_heads", "ffn_hidden_size", "vocab_size")
                )
            ]
            raise ConfigError(
                f"{name} ({value}) is not divisible by parallel.tensor: {size}",
                hint=f"use {', '.join(map(str, divisors))}",
            )


def split_tensors(net: nn.Module, mesh: DeviceMesh) -> None:
    """Split the linear layers and the embedding of ``net`` over a one-axis mesh, in place.

    Every process holds the same full weights before. A tied weight stays tied.
    """
    done: dict[int, nn.Parameter] = {}
    for name, module in list(net.named_modules()):
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear) and leaf in (*COLUMN, *ROW):
            _split_linear(module, mesh, is_column=leaf in COLUMN)
        elif isinstance(module, nn.Embedding) and leaf == "embed_tokens":
            if isinstance(module, PromptEmbedding):
                raise ConfigError("P-tuning runs without tensor parallelism", hint="set parallel.tensor = 1")
            _set(module, "weight", mesh, Shard(0), done)
            _hook(module, mesh, Replicate(), Replicate())
        elif isinstance(module, nn.Linear) and leaf == "lm_head":
            # Used by its weight alone: the loss is computed on vocabulary shards.
            _set(module, "weight", mesh, Shard(0), done)


def _split_linear(module: nn.Linear, mesh: DeviceMesh, *, is_column: bool) -> None:
    _set(module, "weight", mesh, Shard(0) if is_column else Shard(1))
    if module.bias is not None:
        _set(module, "bias", mesh, Shard(0) if is_column else Replicate())
    if isinstance(module, LoraLinear):
        _set(module.lora_A, "weight", mesh, Replicate() if is_column else Shard(1))
        _set(module.lora_B, "weight", mesh, Shard(0) if is_column else Replicate())
    elif isinstance(module, BottleneckLinear):
        for part in (module.adapter_norm, module.adapter_down, module.adapter_up):
            for name in dict(part.named_parameters(recurse=False)):
                _set(part, name, mesh, Replicate())
    if is_column:
        _hook(module, mesh, Replicate(), Shard(-1))
    else:
        _hook(module, mesh, Shard(-1), Replicate())


def _set(
    module: nn.Module,
    name: str,
    mesh: DeviceMesh,
    placement: Placement,
    done: dict[int, nn.Parameter] | None = None,
) -> None:
    old = getattr(module, name)
    known = {} if done is None else done
    if id(old) not in known:
        # No broadcast: every process has loaded the same weights.
        split = distribute_tensor(old.detach(), mesh, [placement], src_data_rank=None)
        known[id(old)] = nn.Parameter(split, requires_grad=old.requires_grad)
    setattr(module, name, known[id(old)])


def _hook(module: nn.Module, mesh: DeviceMesh, inner: Placement, outer: Placement) -> None:
    """Plain local tensors outside the module, distributed ones inside."""

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (DTensor.from_local(arguments[0], mesh, [inner], run_check=False), *arguments[1:])

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Tensor:
        local: Tensor = output.redistribute(mesh, [outer]).to_local()
        return local

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def settle_gradients(parameters: dict[str, nn.Parameter]) -> None:
    """Add up gradients that are still spread as partial sums over the mesh of a whole parameter."""
    for parameter in parameters.values():
        gradient = parameter.grad
        if (
            isinstance(gradient, DTensor)
            and isinstance(parameter, DTensor)
            and gradient.placements != parameter.placements
        ):
            parameter.grad = gradient.redistribute(parameter.device_mesh, parameter.placements)


def total_norm(gradients: list[Tensor]) -> float:
    """Euclidean norm over gradients of any layouts: one collective for each layout."""
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        groups.setdefault(key, []).append(gradient)
    squares = 0.0
    for group in groups.values():
        norm = torch.nn.utils.get_total_norm(group)
        squares += float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
    return float(squares**0.5)
