"""The model of a run: built without memory, split if there are several processes, then filled by regions.

``Origin`` knows where each weight comes from: a checkpoint, the recipe's seed, a fresh adapter. Every process
asks it for the regions of its own shards; a single process asks for all, and so gets the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import Checkpoint, row_ranges
from nemotron4.checkpoint.load import load_weights, match_weights
from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.model.adapters import add_adapter, fresh_adapter, quantize_frozen
from nemotron4.model.attention import RotaryEmbedding
from nemotron4.model.config import ModelConfig
from nemotron4.model.quantized_weight import quantized_weights
from nemotron4.model.reward_head import ATTRIBUTE_NAMES, CARD_WEIGHTS, RewardModel, fresh_head
from nemotron4.model.transformer import Transformer
from nemotron4.training.composing import check_composable, trained_before, trains_on
from nemotron4.training.pipeline import EMBEDDING, OUTPUT
from nemotron4.training.recipe import Recipe
from nemotron4.training.reference import combined_hash, hash_values
from nemotron4.training.scorer import (
    Scorer,
    ValueScorer,
    checkpoint_activations,
)

Region = tuple[slice, ...]
DORA_LENGTHS = ".lora_magnitude_vector"


@dataclass(frozen=True)
class WeightSource:
    """One whole tensor that can be read in part, as float32."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[Region], Tensor]

    def blocks(self) -> Iterator[Tensor]:
        """All of it, a few rows at a time."""
        columns = tuple(slice(0, size) for size in self.shape[1:])
        for start, stop in row_ranges(0, self.shape[0], self.shape[1:]):
            yield self.read((slice(start, stop), *columns))


class Origin:
    """Every weight of the model that a recipe starts from. Nothing is read before it is asked for."""

    def __init__(self, recipe: Recipe, base: Checkpoint, config: ModelConfig) -> None:
        self.recipe = recipe
        self.config = config
        self.compute: torch.dtype = getattr(torch, recipe.model.compute)
        self.base = base
        check_adapter(recipe, base, config)
        self._trains_on = trains_on(base, recipe.adapter)
        self._weights = base if self._trains_on is None else self._trains_on.base
        self._is_reward = recipe.kind.has_reward_head
        self._has_fresh_head = self._is_reward and not base.config.num_reward_attributes
        if recipe.model.preset is not None:
            if self._is_reward:
                raise ConfigError("a reward model starts from a trained model", hint="set model.start")
        else:
            self._names = match_weights(self._empty(), self._weights, skip=self._skips(self._weights))

    def _skips(self, base: Checkpoint) -> dict[str, str]:
        if not self._has_fresh_head:
            return {}
        fresh = "the head is new and drawn from the recipe's seed"
        skips = {"reward_head.weight": fresh, "reward_head.bias": fresh}
        if OUTPUT in base.tensors:
            skips[OUTPUT] = "a reward model has no output layer"
        return skips

    def _empty(self) -> Transformer | RewardModel:
        with torch.device("meta"):
            return RewardModel(self.config) if self._is_reward else Transformer(self.config)

    def scorer(self) -> Scorer:
        """The whole model with its adapter, on the meta device: names and shapes, no values."""
        net = self._empty()
        if self.recipe.adapter is not None:
            add_adapter(net, self.recipe.adapter, seed=self.recipe.run.seed)
            if isinstance(net, RewardModel):
                # A head trains whole, with the adapter that shapes its input.
                net.reward_head.requires_grad_(True)
        if self.recipe.model.quantize is not None:
            quantize_frozen(net, self.recipe.model.quantize)
        _narrow_frozen(net, self.compute)
        if self.recipe.model.activation_checkpointing:
            checkpoint_activations(net.model)
        return self.recipe.kind.scorer(net, self.recipe.settings)

    def policy(self) -> Transformer:
        """The language model alone, in the type that it computes in, on the meta device."""
        net = self.scorer().net
        assert isinstance(net, Transformer), "a policy is a language model"
        return net.to(self.compute)

    def weights(self) -> Iterator[WeightSource]:
        """The model's own weights, each once."""
        seed = self.recipe.run.seed
        if self.recipe.model.preset is not None:
            net = self._empty()
            assert isinstance(net, Transformer), "checked above"
            for name, tensor in net.fresh_weights(seed=seed):
                yield in_memory(name, tensor)
            return
        for name in self._names:
            shape = self._weights.tensors[name].shape
            yield WeightSource(name, shape, partial(_read_region, self._weights, name, shape))
        if self._has_fresh_head:
            weight_AD, bias_A = fresh_head(self.config, seed=seed)
            yield in_memory("reward_head.weight", weight_AD)
            yield in_memory("reward_head.bias", bias_A)

    def adapter(self) -> Iterator[WeightSource]:
        """The adapter's tensors, if the recipe has one: fresh, or of the one that trains on."""
        if self.recipe.adapter is None:
            return
        net = self.scorer().net
        if self._trains_on is not None:
            trained = trained_before(self._trains_on)
            wanted = {name for name, _ in net.named_parameters() if ".lora_" in name}
            if differing := sorted(wanted ^ trained.keys()):
                where = self._trains_on.adapter_path
                raise CheckpointError(
                    f"{where}: has no {differing[0]!r}, or the model has not; it cannot train on"
                )
            yield from (in_memory(name, tensor) for name, tensor in trained.items())
            return
        for name, tensor in fresh_adapter(net, seed=self.recipe.run.seed):
            yield in_memory(name, tensor)
        if self.recipe.adapter.use_dora:
            names = [name for name, _ in net.named_parameters() if name.endswith(DORA_LENGTHS)]
            weights = {f"{name.removesuffix(DORA_LENGTHS)}.weight": name for name in names}
            for source in self.weights():
                if source.name in weights:
                    lengths = torch.cat([block.norm(dim=1) for block in source.blocks()])
                    yield in_memory(weights[source.name], lengths)

    def sources(self) -> Iterator[WeightSource]:
        """Everything that the scorer's parameters are filled with."""
        yield from self.weights()
        yield from self.adapter()

    def hash(self) -> str:
        """``reference.model_hash`` of the model; the processes share the reading of it."""
        is_alone = not dist.is_initialized()
        size, rank = (1, 0) if is_alone else (dist.get_world_size(), dist.get_rank())
        mine = {}
        for number, source in enumerate(self.weights()):
            if number % size == rank:
                mine[source.name] = hash_values(source.shape, source.blocks())
        if is_alone:
            return combined_hash(mine)
        parts: list[dict[str, str]] = [{} for _ in range(size)]
        dist.all_gather_object(parts, mine)
        return combined_hash({name: text for part in parts for name, text in part.items()})


def check_adapter(recipe: Recipe, base: Checkpoint, config: ModelConfig) -> None:
    """ConfigError for an adapter whose result no file could hold: on a start that does not go with it, or on
    one of two modules that share a weight.
    """
    check_composable(base, recipe.adapter)
    if recipe.model.new_tokens and recipe.adapter is not None:
        raise ConfigError(
            "model.new_tokens have rows that must train, and an adapter freezes them",
            hint="train the whole model without [adapter] once, and put adapters on its result",
        )
    is_plain = recipe.adapter is not None and recipe.adapter.kind == "lora" and not recipe.adapter.use_dora
    if recipe.model.quantize is not None and (not is_plain or recipe.parallel.num_processes > 1):
        raise ConfigError(
            f"model.quantize = {recipe.model.quantize} is for an [adapter] of kind lora, without use_dora, "
            "in one process",
            hint="what trains cannot be quantised; leave model.quantize out",
        )
    if recipe.adapter is None:
        return
    if twice := set(recipe.adapter.target_names) & set(recipe.adapter.modules_to_save):
        raise ConfigError(
            f"adapter.targets and adapter.modules_to_save both name {min(twice)}, which other programs open "
            "without its LoRA",
            hint="a module that trains whole needs no LoRA: take it out of targets",
        )
    if not config.tie_embeddings:
        return
    named = (*recipe.adapter.target_names, *recipe.adapter.modules_to_save)
    tied = [name for name in named if name in ("lm_head", "embed_tokens")]
    if tied and recipe.adapter.kind == "lora":
        raise ConfigError(
            f"adapter names {tied[0]}, which shares its weight with "
            f"{'the embedding' if tied[0] == 'lm_head' else 'the output layer'} in this model",
            hint="leave it out, or train the whole model without [adapter]",
        )


def _narrow_frozen(net: nn.Module, dtype: torch.dtype) -> None:
    """Frozen weights have no update to be precise for; a tied weight stays tied."""
    made: dict[int, nn.Parameter] = {}
    for module in net.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if not old.requires_grad and old.dtype != dtype:
                if id(old) not in made:
                    made[id(old)] = nn.Parameter(old.to(dtype), requires_grad=False)
                setattr(module, name, made[id(old)])


def in_memory(name: str, tensor: Tensor) -> WeightSource:
    return WeightSource(name, tuple(tensor.shape), lambda region: tensor[region])


def _read_region(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], region: Region) -> Tensor:
    """Block by block, so that a split of the columns holds a few whole rows at most."""
    rows, *columns = region
    out = torch.empty([part.stop - part.start for part in region])
    for start, stop in row_ranges(rows.start, rows.stop, shape[1:]):
        block = checkpoint.read_rows(name, start, stop, torch.float32)
        out[start - rows.start : stop - rows.start] = block[(slice(None), *columns)]
    return out


@torch.no_grad()
def fill(net: Transformer | RewardModel, sources: Iterable[WeightSource], device: torch.device) -> None:
    """Give every parameter of a model, split or whole, its memory on the device and its values."""
    slots = _allocate(net, device)
    quantized = quantized_weights(net)
    for module in quantized.values():
        module.to_empty(device=device)
    for source in sources:
        if source.name in quantized:
            start = 0
            for block in source.blocks():
                quantized[source.name].put(start, block.to(device))
                start += len(block)
            del quantized[source.name]
            continue
        parameter = slots.pop(source.name, None)
        if parameter is not None:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.copy_(source.read(_region(parameter)))
    assert not slots, f"no values for {sorted(slots)}"
    assert not quantized, f"no values for {sorted(quantized)}"
    net.model.rotary = RotaryEmbedding(net.config).to(device)


def _allocate(net: Transformer | RewardModel, device: torch.device) -> dict[str, nn.Parameter]:
    """New parameters in place of those on the meta device; a tied weight stays tied."""
    made: dict[int, nn.Parameter] = {}
    for module in net.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in made:
                empty = torch.empty_like(old, device=device)
                made[id(old)] = nn.Parameter(empty, requires_grad=old.requires_grad)
            setattr(module, name, made[id(old)])
    slots = dict(net.named_parameters())
    if net.config.tie_embeddings and OUTPUT in slots:
        slots[EMBEDDING] = slots.pop(OUTPUT)
    return slots


def _region(parameter: Tensor) -> Region:
    """Where this process's part of a parameter lies in the whole."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


# ---- PPO's critic: a decoder of its own with one output

NOT_LOADED = "a critic has one output of its own"


def build_critic(recipe: Recipe, policy_base: Checkpoint, policy: ModelConfig) -> ValueScorer:
    """The critic that the recipe names. From a reward model it starts as the card's weighted sum of its
    attributes; from a language model its output starts at zero.
    """
    start = recipe.settings.critic.start
    base = policy_base if start is None else open_checkpoint(start)
    num_outputs = base.config.num_reward_attributes
    if base.config.vocab_size != policy.vocab_size:
        raise ConfigError(
            f"the critic has a vocabulary of {base.config.vocab_size}, the policy one of {policy.vocab_size}",
            hint="start both from models with one tokenizer",
        )
    config = ModelConfig(**{**base.config.__dict__, "num_reward_attributes": num_outputs or 1})
    with torch.device("meta"):
        net = RewardModel(config)
    skip = {}
    if not num_outputs:
        skip = dict.fromkeys(("reward_head.weight", "reward_head.bias"), NOT_LOADED)
        if "lm_head.weight" in base.tensors:
            skip["lm_head.weight"] = NOT_LOADED
    load_weights(net, base, dtype=torch.float32, skip=skip)
    net.model.rotary = RotaryEmbedding(config)
    net.reward_head = _value_head(net, num_outputs)
    return ValueScorer(net)


@torch.no_grad()
def _value_head(net: RewardModel, num_outputs: int) -> nn.Linear:
    head = nn.Linear(net.config.hidden_size, 1, dtype=torch.float32)
    head.weight.zero_()
    head.bias.zero_()
    if num_outputs:
        if num_outputs != len(ATTRIBUTE_NAMES):
            raise ConfigError(
                f"the critic's reward model has {num_outputs} outputs; expected {len(ATTRIBUTE_NAMES)}"
            )
        weights_A = torch.tensor([CARD_WEIGHTS.get(name, 0.0) for name in ATTRIBUTE_NAMES])
        head.weight.copy_(weights_A[None] @ net.reward_head.weight)
        head.bias.copy_(weights_A @ net.reward_head.bias[:, None])
    return head
