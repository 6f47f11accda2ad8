"""The planned bytes are those of the real model on a 16-rank process group: TP 8 x PP 2, on no device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemotron4.cluster.layout import ParallelSizes, serving_bytes
from nemotron4.cluster.sizes import WeightBytes, stage_tensors
from nemotron4.model.presets import nemotron4_340b
from nemotron4.model.transformer import Transformer

LAYOUT = ParallelSizes(tensor_parallel=8, pipeline_parallel=2)


@pytest.fixture(params=[0, 3, 15])
def rank(request: pytest.FixtureRequest) -> Iterator[int]:
    """A fake group of 16 processes, seen from one of them: collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=LAYOUT.num_gpus)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_every_rank_of_the_340b_holds_the_planned_shapes_and_bytes(rank: int) -> None:
    config = nemotron4_340b()
    with torch.device("meta"):
        model = Transformer(config).bfloat16()
    mesh = init_device_mesh(
        "cpu", (LAYOUT.pipeline_parallel, LAYOUT.tensor_parallel), mesh_dim_names=("stage", "tensor")
    )
    stage = mesh["stage"].get_local_rank()
    planned = {tensor.name: tensor for tensor in stage_tensors(config, stage, LAYOUT.pipeline_parallel)}
    num_bytes = 0
    for name, parameter in model.named_parameters():
        if name not in planned:
            continue
        split = planned[name].split
        placement = Replicate() if split is None else Shard(split)
        local = distribute_tensor(parameter.detach(), mesh["tensor"], [placement])
        assert isinstance(local, DTensor)
        shape = tuple(local.to_local().shape)
        assert shape == planned.pop(name).local_shape(LAYOUT.tensor_parallel), name
        num_bytes += 2 * math.prod(shape)
    assert not planned
    weights = WeightBytes("bf16")
    planned_bytes = serving_bytes(config, LAYOUT, stage, weights=weights, context=1, concurrency=1)
    assert num_bytes == planned_bytes.weights
