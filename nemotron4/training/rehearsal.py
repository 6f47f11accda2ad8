"""A stage on one process of a launch that does not exist: shapes, bytes and steps of a model too large here.

The trainer's own code splits the model over a group whose collectives return at once; no weight has memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from nemotron4.checkpoint.interface import TensorInfo
from nemotron4.errors import ConfigError
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.config import ModelConfig
from nemotron4.model.transformer import Transformer
from nemotron4.training import checks, inputs, parallel
from nemotron4.training.loading import Origin
from nemotron4.training.optimizer import MOMENT_BYTES
from nemotron4.training.recipe import ParallelSection, Recipe
from nemotron4.training.schedule import plan_steps


@dataclass(frozen=True)
class Rehearsed:
    """A stage by its shape: what its processes hold, and how many steps its samples make.

    ``rank_state_bytes``: float32 weights that train and their two moments, on each rank that was looked at.
    """

    config: ModelConfig
    num_processes: int
    num_steps: int
    largest_step: int  # in samples
    num_samples: int  # over all steps
    rank_state_bytes: dict[int, int]
    checkpoint_bytes: int  # of one checkpoint, all processes together

    @property
    def largest_bytes(self) -> int:
        return max(self.rank_state_bytes.values())


def rehearse(recipe: Recipe, num_samples: int) -> Rehearsed:
    """Build the first and the last rank of the recipe's layout, and count the steps of so many samples.

    A shape that does not divide is refused by the code that would split it.
    """
    config = inputs.shape_config(recipe)
    sizes = plan_steps(recipe, num_samples).sizes
    last = recipe.parallel.num_processes - 1
    split = _Split(recipe.parallel, config, recipe.adapter, recipe.kind.has_reward_head, recipe)
    states = {rank: _state_bytes(split, rank) for rank in sorted({0, last})}
    trained = checks.trainable_parameters(recipe, config)
    return Rehearsed(config, last + 1, len(sizes), max(sizes), sum(sizes), states, _kept(recipe, trained))


@dataclass(frozen=True)
class _Split:
    """What the bytes of a rank depend on, and a recipe that has it."""

    parallel: ParallelSection
    config: ModelConfig
    adapter: AdapterConfig | None
    has_reward_head: bool
    recipe: Recipe = field(compare=False)


@functools.lru_cache(maxsize=32)  # a build takes up to half a minute, and stages are split alike
def _state_bytes(split: _Split, rank: int) -> int:
    with _engine(split.recipe, split.config, rank) as engine:
        return _state(split.recipe, sum(_local(p).numel() for p in engine.trainable.values()))


def _state(recipe: Recipe, trained: int) -> int:
    """Bytes of so many float32 numbers and their moments where the model is."""
    return int((4 + MOMENT_BYTES[recipe.optimizer.moments]) * trained)


def _kept(recipe: Recipe, trained: int) -> int:
    """The same of a checkpoint, which has offloaded moments too."""
    return int((4 + (MOMENT_BYTES[recipe.optimizer.moments] or MOMENT_BYTES["float32"])) * trained)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _engine(recipe: Recipe, config: ModelConfig, rank: int) -> Iterator[Any]:
    """The model of one rank, on the meta device."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # torch has no public name for it

    if dist.is_initialized():
        raise ConfigError("a rehearsal is made by one process alone", hint="run it without torchrun")
    origin = Origin(recipe, _without_values(recipe, config), config)
    size = recipe.parallel.num_processes
    if size == 1:
        yield parallel.distribute(origin.scorer(), None, torch.device("cpu"), compute=origin.compute)
        return
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]  # it would hand on the rank of the process before
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        grid = parallel.build_grid(recipe.parallel, "cpu")
        yield parallel.distribute(origin.scorer(), grid, torch.device("cpu"), compute=origin.compute)
    finally:
        dist.destroy_process_group()


def _without_values(recipe: Recipe, config: ModelConfig) -> Any:
    """A checkpoint that has the tensors of a base of this shape, and none of their values."""

    def read_rows(name: str, *_: object) -> Tensor:
        raise AssertionError(f"{name} is read in a rehearsal")

    base = inputs.preset_config(recipe.model.shape or recipe.model.preset or "")
    with torch.device("meta"):
        shapes: Sequence[tuple[str, Tensor]] = list(Transformer(base).named_parameters())
    file = Path("rehearsal")
    tensors = {name: TensorInfo(name, tuple(p.shape), "bfloat16", file, 0) for name, p in shapes}
    functions = {"read_rows": read_rows, "require_readable": lambda: None}
    return SimpleNamespace(config=base, tensors=tensors, path=file, **functions)
