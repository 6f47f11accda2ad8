"""The smallest layout that fits, and why a smaller one does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemotron4.cluster.hardware import Dtype, Gpu
from nemotron4.cluster.layout import (
    MFU_FORMULA,
    Method,
    Moments,
    ParallelSizes,
    RankBytes,
    ServingRates,
    Train,
    largest,
    serving_bytes,
    serving_rates,
    training_bytes,
    training_operations,
)
from nemotron4.cluster.sizes import Shape, WeightBytes, bytes_by_part, num_parameters
from nemotron4.errors import ConfigError
from nemotron4.plots import draw_stacks

KvCacheDtype = Literal["auto", "fp8"]
USABLE = 0.92  # share of a GPU's memory that is planned for; the rest is fragmentation
MAX_NODES = 128


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the GPUs are for."""

    dtype: Dtype = "bf16"
    context: int = 4096
    concurrency: int = 8
    train: Train | None = None
    method: Method = "sft"
    batch: int = 128
    kv_cache_dtype: KvCacheDtype = "auto"
    moments: Moments = "float32"
    stored: Mapping[str, int] = field(default_factory=dict)  # bytes of a checkpoint's own tensors

    def __post_init__(self) -> None:
        for name in ("context", "concurrency", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.train is not None and self.dtype != "bf16":
            raise ConfigError(
                f"dtype is {self.dtype!r}; training is planned in bf16", hint="leave --dtype out"
            )

    @property
    def weights(self) -> WeightBytes:
        return WeightBytes(self.dtype, self.stored)

    @property
    def kv_bytes(self) -> int:
        return 1 if self.kv_cache_dtype == "fp8" else 2


@dataclass(frozen=True)
class Attempt:
    """A layout, the bytes of one rank of each stage, and why it does not fit (None if it does)."""

    layout: ParallelSizes
    stages: tuple[RankBytes, ...]
    problem: str | None


@dataclass(frozen=True)
class HardwarePlan:
    """The answer: a layout with its bytes, and the smaller ones that were tried."""

    shape: Shape
    gpu: Gpu
    workload: Workload
    chosen: Attempt
    rejected: tuple[Attempt, ...]
    smallest: Attempt | None  # of all layouts, also where another one was asked for

    @property
    def layout(self) -> ParallelSizes:
        return self.chosen.layout

    @property
    def usable_bytes(self) -> int:
        return int(self.gpu.memory_bytes * USABLE)

    @property
    def rates(self) -> ServingRates | None:
        if self.workload.train is not None:
            return None
        work = self.workload
        return serving_rates(
            self.shape,
            self.layout,
            self.gpu,
            list(self.chosen.stages),
            dtype=work.dtype,
            context=work.context,
            concurrency=work.concurrency,
        )

    def to_json(self) -> dict[str, Any]:
        layout, work = self.layout, self.workload
        rank = largest(list(self.chosen.stages))
        values: dict[str, Any] = {
            "num_parameters": num_parameters(self.shape),
            "weight_bytes": bytes_by_part(self.shape, work.weights),
            "gpu": self.gpu.name,
            "dtype": work.dtype,
            "context": work.context,
            "concurrency": work.concurrency,
            "kv_cache_dtype": work.kv_cache_dtype,
            "train": work.train,
            "method": work.method if work.train else None,
            "fits": self.chosen.problem is None,
            "problem": self.chosen.problem,
            "num_gpus": layout.num_gpus,
            "num_nodes": -(-layout.num_gpus // self.gpu.gpus_per_node),
            "tensor_parallel": layout.tensor_parallel,
            "pipeline_parallel": layout.pipeline_parallel,
            "data_parallel": layout.data_parallel,
            "bytes_per_rank": rank.to_json(),
            "bytes_per_stage": [stage.to_json() for stage in self.chosen.stages],
            "usable_bytes_per_gpu": self.usable_bytes,
            "smallest": None if self.smallest is None else _attempt_json(self.smallest),
            "smaller": [_attempt_json(attempt) for attempt in self.rejected],
        }
        if work.train is None:
            return values | {"rates": None if self.rates is None else self.rates.to_json()}
        operations = training_operations(self.shape, batch=work.batch, context=work.context)
        peak = self.gpu.rate("bf16")
        return values | {
            "batch": work.batch,
            "operations_per_step": operations,
            "step_s_at_peak": None if peak is None else operations / (layout.num_gpus * peak),
            "mfu_formula": MFU_FORMULA,
        }


def _attempt_json(attempt: Attempt) -> dict[str, Any]:
    return {
        "num_gpus": attempt.layout.num_gpus,
        "tensor_parallel": attempt.layout.tensor_parallel,
        "pipeline_parallel": attempt.layout.pipeline_parallel,
        "problem": attempt.problem,
    }


def make_plan(
    shape: Shape,
    gpu: Gpu,
    workload: Workload,
    *,
    tensor_parallel: int | None = None,
    pipeline_parallel: int | None = None,
) -> HardwarePlan:
    """Try layouts from the smallest; a given parallel size is kept. Raises ConfigError if none fits.

    When both sizes are given, that one layout is described, whether it fits or not.
    """
    rejected: list[Attempt] = []
    given = tensor_parallel is not None and pipeline_parallel is not None
    for layout in _layouts(shape, gpu, tensor_parallel, pipeline_parallel):
        attempt = _attempt(shape, gpu, workload, layout)
        if attempt.problem is None or given:
            is_free = tensor_parallel is None and pipeline_parallel is None
            smallest = attempt if is_free else _smallest(shape, gpu, workload)
            return HardwarePlan(shape, gpu, workload, attempt, tuple(rejected), smallest)
        rejected.append(attempt)
    last = rejected[-1]
    raise ConfigError(
        f"no layout of up to {last.layout.num_gpus} x {gpu.name} fits: {last.problem}",
        hint="use a larger GPU, a smaller --context or --concurrency, or --dtype fp8",
    )


def _smallest(shape: Shape, gpu: Gpu, workload: Workload) -> Attempt | None:
    """Of all layouts, the first that fits."""
    attempts = (_attempt(shape, gpu, workload, layout) for layout in _layouts(shape, gpu, None, None))
    return next((attempt for attempt in attempts if attempt.problem is None), None)


def _layouts(shape: Shape, gpu: Gpu, tensor: int | None, pipeline: int | None) -> Iterator[ParallelSizes]:
    """Layouts by number of GPUs: 1, 2, 4 ... of one node, then whole nodes.

    Tensor parallelism stays inside a node; among equals the widest one comes first.
    """
    sizes = [
        n for n in range(1, gpu.gpus_per_node + 1) if _can_split(shape, n) and gpu.gpus_per_node % n == 0
    ]
    if tensor is not None and not _can_split(shape, tensor):
        raise ConfigError(
            f"tensor_parallel is {tensor}; the model has {shape.num_kv_heads} key/value heads, "
            f"{shape.ffn_hidden_size} FFN rows and {shape.vocab_size} vocabulary rows to divide",
            hint=f"use one of {', '.join(map(str, sizes))}",
        )
    if pipeline is not None and (pipeline < 1 or shape.num_layers % pipeline):
        divisors = [n for n in range(1, shape.num_layers + 1) if shape.num_layers % n == 0]
        raise ConfigError(
            f"pipeline_parallel is {pipeline}; {shape.num_layers} layers do not divide by it",
            hint=f"use one of {', '.join(map(str, divisors))}",
        )
    tensor_sizes = [tensor] if tensor is not None else sizes
    pipeline_sizes = [pipeline] if pipeline is not None else range(1, shape.num_layers + 1)
    candidates = [
        ParallelSizes(tp, pp) for tp in tensor_sizes for pp in pipeline_sizes if shape.num_layers % pp == 0
    ]
    is_free = tensor is None or pipeline is None
    whole = [layout for layout in candidates if not is_free or _is_whole(layout.num_gpus, gpu)]
    widest: dict[int, ParallelSizes] = {}
    for layout in sorted(whole, key=lambda layout: layout.tensor_parallel):
        widest[layout.num_gpus] = layout
    if not widest:
        raise ConfigError(f"no layout with tensor_parallel {tensor} fills whole nodes of {gpu.gpus_per_node}")
    yield from (widest[n] for n in sorted(widest) if n <= MAX_NODES * gpu.gpus_per_node)


def _can_split(shape: Shape, tensor_parallel: int) -> bool:
    rows = (shape.num_kv_heads, shape.num_heads, shape.ffn_hidden_size, shape.vocab_size)
    return tensor_parallel >= 1 and all(n % tensor_parallel == 0 for n in rows)


def _is_whole(num_gpus: int, gpu: Gpu) -> bool:
    """A power of two inside a node, or whole nodes."""
    inside = num_gpus < gpu.gpus_per_node and num_gpus & (num_gpus - 1) == 0
    return inside or num_gpus % gpu.gpus_per_node == 0


def _attempt(shape: Shape, gpu: Gpu, workload: Workload, layout: ParallelSizes) -> Attempt:
    stages = []
    for stage in range(layout.pipeline_parallel):
        if workload.train is None:
            rank = serving_bytes(
                shape,
                layout,
                stage,
                weights=workload.weights,
                context=workload.context,
                concurrency=workload.concurrency,
                kv_bytes=workload.kv_bytes,
            )
        else:
            rank = training_bytes(
                shape,
                layout,
                stage,
                train=workload.train,
                method=workload.method,
                context=workload.context,
                moments=workload.moments,
            )
        stages.append(rank)
    usable = int(gpu.memory_bytes * USABLE)
    rank = largest(stages)
    problem = None
    if workload.train == "qlora" and layout.num_gpus > 1:
        problem = "a quantised base trains in one process"
    elif workload.train and workload.moments != "float32" and layout.num_gpus > 1:
        problem = f"moments that are {workload.moments} train in one process"
    elif rank.total > usable:
        first, *rest = sorted(
            ((name, size) for name, size in rank.to_json().items() if name != "total" and size),
            key=lambda item: -item[1],
        )
        others = ", ".join(f"{name.replace('_', ' ')} {size / 1e9:.1f}" for name, size in rest)
        problem = (
            f"each GPU needs {rank.total / 1e9:.1f} GB ({first[0].replace('_', ' ')} {first[1] / 1e9:.1f}, "
            f"{others}); {usable / 1e9:.1f} of {gpu.memory_bytes / 1e9:.1f} GB are usable"
        )
    return Attempt(layout, tuple(stages), problem)


def draw(plan: HardwarePlan, path: Path, *, title: str) -> None:
    """Write the picture; the ending of the name decides the format."""
    stages = [stage.to_json() for stage in plan.chosen.stages]
    parts = {name: [stage[name] / 1e9 for stage in stages] for name in stages[0] if name != "total"}
    layout = plan.layout
    draw_stacks(
        [f"stage {number}" for number in range(len(stages))],
        {name: sizes for name, sizes in parts.items() if any(sizes)},
        path,
        title=f"{title}: {layout.num_gpus} GPUs, TP {layout.tensor_parallel} x PP {layout.pipeline_parallel}",
        unit="GB on each GPU",
        limits={plan.gpu.name: plan.gpu.memory_bytes / 1e9, "usable": plan.usable_bytes / 1e9},
    )
