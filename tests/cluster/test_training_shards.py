"""The planned bytes of training are those of the engine: the 340B on fake groups of 16 and 128 processes.

The code that splits the model is the trainer's own, on the recipe's settings; no weight has memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemotron4.checkpoint.interface import TensorInfo
from nemotron4.cluster.layout import ParallelSizes, training_bytes
from nemotron4.cluster.sizes import tensor_sizes
from nemotron4.model.config import ModelConfig
from nemotron4.model.presets import nemotron4_340b
from nemotron4.training import checkpoints, parallel
from nemotron4.training import recipe as recipes
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.loading import Origin

RECIPES = Path(__file__).parents[2] / "recipes" / "nemotron4-340b"
LORA = ("adapter.kind=lora", "adapter.rank=32", 'adapter.targets=["all"]')


def base(config: ModelConfig) -> Any:
    """A checkpoint with the planner's list of tensors and no values."""

    def read_rows(*_: object) -> Tensor:
        raise AssertionError("nothing is read")

    file = Path("340b")
    tensors = {t.name: TensorInfo(t.name, t.shape, "bfloat16", file, 0) for t in tensor_sizes(config)}
    functions = {"read_rows": read_rows, "require_readable": lambda: None}
    return SimpleNamespace(config=config, tensors=tensors, path=file, **functions)


@contextmanager
def engine_on(layout: ParallelSizes, rank: int, *overrides: str) -> Iterator[TrainingEngine]:
    """The recipe's model on one of the layout's processes; collectives return at once."""
    sizes = (
        f"parallel.tensor={layout.tensor_parallel}",
        f"parallel.pipeline={layout.pipeline_parallel}",
        f"parallel.data={layout.data_parallel}",
    )
    recipe = recipes.load(RECIPES / "code-sft.toml", [*sizes, *overrides])
    _clear_sharding_prop_cache()  # it would hand on the rank of the process before
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.num_gpus)
    try:
        config = nemotron4_340b()
        origin = Origin(recipe, base(config), config)
        grid = parallel.build_grid(recipe.parallel, "cpu")
        yield parallel.distribute(origin.scorer(), grid, torch.device("cpu"), compute=origin.compute)
    finally:
        dist.destroy_process_group()


def local_bytes(tensors: Iterator[Tensor]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def state_bytes(engine: TrainingEngine) -> int:
    """Float32 weights that train and their two moments, as they lie in a checkpoint."""
    trainable = engine.trainable
    state = checkpoints.plain_tensors(trainable, torch.optim.AdamW(trainable.values()))
    return local_bytes(t for name, t in state.items() if ".step." not in name)


@pytest.mark.parametrize(
    ("layout", "rank", "train"),
    [
        pytest.param(ParallelSizes(8, 2), 0, "full", marks=pytest.mark.slow),
        (ParallelSizes(8, 2), 15, "full"),
        (ParallelSizes(8, 2), 9, "lora"),
        (ParallelSizes(8, 2, 8), 127, "full"),
        (ParallelSizes(8, 16), 24, "full"),
    ],
    ids=lambda value: (
        f"tp{value.tensor_parallel}pp{value.pipeline_parallel}dp{value.data_parallel}"
        if isinstance(value, ParallelSizes)
        else str(value)
    ),
)
def test_the_planned_bytes_of_training_are_the_engines(layout: ParallelSizes, rank: int, train: Any) -> None:
    stage = rank // (layout.tensor_parallel * layout.data_parallel)
    planned = training_bytes(nemotron4_340b(), layout, stage, train=train, method="sft", context=4096)
    with engine_on(layout, rank, *(LORA if train == "lora" else ())) as engine:
        assert state_bytes(engine) == planned.optimizer
        parameters = list(engine.scorer.net.parameters())
        # A pipeline stage keeps the gathered copies in 16 bits and sums float32 gradients of their size.
        gathered = layout.data_parallel * sum(local_bytes(iter([p])) // p.dtype.itemsize for p in parameters)
        trained = layout.data_parallel * local_bytes(p for p in parameters if p.requires_grad)
    assert 2 * gathered == planned.weights
    assert trained == planned.gradients


@pytest.mark.slow
def test_fsdp_with_tensor_parallel_on_128_processes_divides_all_state() -> None:
    with engine_on(ParallelSizes(8, 1, 16), 77) as engine:
        gradients = local_bytes(iter(engine.trainable.values()))
        assert state_bytes(engine) == 3 * gradients
        total = state_bytes(engine) + gradients
    # Norms are whole on every tensor rank; the rest is divided by 128: 39.7 GiB.
    assert total == pytest.approx(16 * nemotron4_340b().num_parameters / 128, rel=1e-3)
