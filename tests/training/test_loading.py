"""Loading a model: the bits of the checkpoint's own loader, and no process reads more than its own parts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.huggingface import HuggingFaceCheckpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.checkpoint.write_huggingface import config_json
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapters import add_adapter
from nemotron4.training import parallel
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.loading import Origin
from nemotron4.training.objectives import LikelihoodObjective
from nemotron4.training.recipe import ModelSection, ParallelSection, Recipe
from nemotron4.training.scorer import LogprobScorer
from tests.training import tiny

CPU = torch.device("cpu")


class Counted:
    """A checkpoint that counts the values it was asked for."""

    def __init__(self, base: HuggingFaceCheckpoint) -> None:
        self._base = base
        self.num_read = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._base, name)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        rows = self._base.read_rows(name, start, stop, dtype)
        self.num_read += rows.numel()
        return rows


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Counted:
    """Bfloat16 weights in the Hugging Face layout."""
    config = tiny.config(num_layers=4, tie_embeddings=request.param)
    folder = tmp_path / "model"
    folder.mkdir()
    net = tiny.logprob_scorer(num_layers=4, tie_embeddings=request.param).net.bfloat16()
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_json(config, dtype=torch.bfloat16)))
    checkpoint = open_checkpoint(str(folder))
    assert isinstance(checkpoint, HuggingFaceCheckpoint)
    return Counted(checkpoint)


@contextmanager
def fake_process(rank: int, size: int) -> Iterator[None]:
    """One process of a launch whose other processes do not exist: nothing is sent, nothing waits."""
    _clear_sharding_prop_cache()  # it would hand on the rank of the process before
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_part(name: str, whole: Tensor, layout: ParallelSection, shard: int, tensor: int) -> Tensor:
    """What the declared split says, written out."""
    leaf = next((part for part in name.split(".") if part.endswith(("_proj", "embed_tokens", "lm_head"))), "")
    is_row = leaf in ("o_proj", "down_proj")
    dim: int | None = 1 if is_row else 0
    if not leaf or ("lora_A" in name and not is_row) or ("lora_B" in name and is_row):
        dim = None
    part = whole if dim is None else whole.chunk(layout.tensor, dim)[tensor]
    pieces = part.chunk(layout.data)
    return pieces[shard] if shard < len(pieces) else part[:0]


def recipe_for(folder: Path, **changes: object) -> Recipe:
    recipe = tiny.make_recipe(folder)
    return dataclasses.replace(recipe, model=ModelSection(start="model"), **changes)  # type: ignore[arg-type]


def loaded(recipe: Recipe, base: Counted) -> LogprobScorer:
    """The model by the loader that inference uses, and the recipe's adapter."""
    net, _ = load_transformer(base, dtype=torch.float32)  # type: ignore[arg-type]
    net.requires_grad_(True)
    if recipe.adapter is not None:
        add_adapter(net, recipe.adapter, seed=recipe.run.seed)
    return LogprobScorer(net)


def assert_split_of(
    whole: TrainingEngine, engine: TrainingEngine, layout: ParallelSection, rank: int
) -> set[str]:
    expected = dict(whole.scorer.net.named_parameters())
    names = set()
    for name, parameter in engine.scorer.net.named_parameters():
        key = name if name in expected else "model.embed_tokens.weight"
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        shard, tensor = divmod(rank % (layout.data * layout.tensor), layout.tensor)
        assert torch.equal(local, local_part(key, expected[key], layout, shard, tensor)), name
        assert parameter.requires_grad == expected[key].requires_grad
        names.add(key)
    return names


@pytest.mark.parametrize("base", [False, True], indirect=True, ids=["untied", "tied"])
@pytest.mark.parametrize(
    "layout",
    [
        ParallelSection(data=4),
        ParallelSection(data=2, tensor=2),
        ParallelSection(pipeline=2, tensor=2),
        ParallelSection(pipeline=2, data=3),
    ],
    ids=str,
)
def test_every_process_loads_its_own_parts(base: Counted, layout: ParallelSection, tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path, adapter=AdapterConfig(kind="lora", rank=4, targets=("all",)))
    whole = TrainingEngine(loaded(recipe, base))
    alone = parallel.build(Origin(recipe, base, base.config), None, CPU)  # type: ignore[arg-type]
    assert_split_of(whole, alone, ParallelSection(), 0)
    names: set[str] = set()
    num_read = []
    for rank in range(layout.num_processes):
        base.num_read = 0
        with fake_process(rank, layout.num_processes):
            origin = Origin(recipe, base, base.config)  # type: ignore[arg-type]
            engine = parallel.build(origin, parallel.build_grid(layout, "cpu"), CPU)
            names |= assert_split_of(whole, engine, layout, rank)
        num_read.append(base.num_read)
    assert names == set(dict(whole.scorer.net.named_parameters()))
    # A split of columns reads its rows whole; everything else is read once on one data rank.
    assert max(num_read) < 0.65 * base.config.num_parameters


@pytest.mark.parametrize("base", [True], indirect=True)
def test_fresh_weights_are_those_of_one_process(base: Counted, tmp_path: Path) -> None:
    recipe = tiny.make_recipe(tmp_path)
    config = tiny.config(num_layers=4, tie_embeddings=True, norm="rmsnorm", mlp="swiglu")
    whole = tiny.logprob_scorer(num_layers=4, tie_embeddings=True, norm="rmsnorm", mlp="swiglu")
    layout = ParallelSection(pipeline=2)
    for rank in range(2):
        with fake_process(rank, 2):
            origin = Origin(recipe, base, config)  # type: ignore[arg-type]
            engine = parallel.build(origin, parallel.build_grid(layout, "cpu"), CPU)
            assert_split_of(TrainingEngine(whole), engine, layout, rank)


@pytest.mark.parametrize("base", [False], indirect=True)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_bfloat16_compute_keeps_float32_masters_of_what_trains(
    base: Counted, tmp_path: Path, adapter: str
) -> None:
    lora = AdapterConfig(kind="lora", rank=4, targets=("all",)) if adapter == "lora" else None
    recipe = recipe_for(tmp_path, adapter=lora)
    narrow = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, compute="bfloat16"))
    whole = TrainingEngine(loaded(recipe, base))
    expected = whole.forward_backward(whole.rows(tiny.texts(4), 64), LikelihoodObjective())
    engine = parallel.build(Origin(narrow, base, base.config), None, CPU)  # type: ignore[arg-type]
    rows = engine.rows(tiny.texts(4), 64)
    result = engine.forward_backward(rows, LikelihoodObjective())
    assert result.loss == pytest.approx(expected.loss, rel=2e-2)
    assert result.loss != expected.loss
    assert engine.grad_norm() == pytest.approx(whole.grad_norm(), rel=5e-2)
    for parameter in engine.scorer.net.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
        assert not parameter.requires_grad or parameter.grad.dtype == torch.float32
