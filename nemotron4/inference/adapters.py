"""LoRA adapters next to one base: each row of a step is computed with the adapter that its request names.

Nothing is merged. The update of an adapter is computed for its own rows alone, by the products that the base
has, so that a request's tokens are the same in any batch. An adapter that is unloaded lives on until the
last request that runs with it has ended.

Shape suffixes: N = packed rows, K = rank, R and C = rows and columns of a weight.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint, is_nemo_adapter, read_nemo_lora
from nemotron4.errors import CheckpointError, ConfigError, RequestError
from nemotron4.inference.packed_linear import (
    PackedAttention,
    PackedLinear,
    PackedSwiGluMLP,
)
from nemotron4.inference.scheduler import Slice
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapter_files import (
    IA3,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    adapter_type,
    has_reward_head,
    read_adapter_config,
)
from nemotron4.model.config import ModelConfig
from nemotron4.model.transformer import Block, Transformer

_numbers = itertools.count(1)


class Update(NamedTuple):
    """What an adapter adds to columns ``start`` to ``stop`` of a product's output."""

    start: int
    stop: int
    down: nn.Module
    up: nn.Module


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """``salt`` keeps its keys and values apart from those of every other adapter in the prefix cache."""

    name: str
    salt: bytes
    updates: Mapping[nn.Module, Sequence[Update]]  # by the layer that they belong to


@dataclass
class StepRows:
    """Which rows of the step that is computed now belong to which adapter."""

    groups: list[tuple[LoadedAdapter, Tensor]] = field(default_factory=list)


class AdaptedLinear(nn.Module):
    """A product of the base, and for the rows of each adapter its update."""

    def __init__(self, base: nn.Module, rows: StepRows) -> None:
        super().__init__()
        self.base = base
        self._rows = rows

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        for adapter, rows_N in self._rows.groups:
            for update in adapter.updates.get(self, ()):
                change: Tensor = update.up(update.down(x[rows_N]))
                out[rows_N, update.start : update.stop] += change
        return out


class AdapterBank:
    """The adapters of one model, by name; any thread may load and unload."""

    def __init__(self, model: Transformer, checkpoint: Checkpoint) -> None:
        """Put an ``AdaptedLinear`` around every product of the model, which is packed already or never."""
        self._checkpoint = checkpoint
        self._rows = StepRows()
        self._loaded: dict[str, LoadedAdapter] = {}
        self._places: dict[str, tuple[AdaptedLinear, int, int]] = {}  # by the name of the weight
        weight = next(model.parameters())
        self._dtype, self._device = weight.dtype, weight.device
        for number, block in enumerate(model.model.blocks()):
            for owner, attribute, parts in _products(block, model.config):
                layer = AdaptedLinear(getattr(owner, attribute), self._rows)
                self._is_packed = isinstance(layer.base, PackedLinear)
                setattr(owner, attribute, layer)
                start = 0
                for name, width in parts.items():
                    place = (layer, start, start + width)
                    self._places[f"model.layers.{number}.{name}.weight"] = place
                    start += width

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def load(self, name: str, path: str | Path, *, force: bool = False) -> None:
        """CheckpointError if it is of another model or more than LoRA; ConfigError for a taken name."""
        if name in self._loaded:
            raise ConfigError(f"an adapter {name!r} is loaded already", hint="unload it first")
        updates: dict[nn.Module, list[Update]] = defaultdict(list)
        for weight, (scale, down_KC, up_RK) in lora_factors(
            Path(path), self._checkpoint, force=force
        ).items():
            if weight not in self._places:
                raise CheckpointError(
                    f"{path}: {weight} cannot be adapted next to the base",
                    hint="merge it: --adapter PATH without a name",
                )
            layer, start, stop = self._places[weight]
            down, up = self._linear(down_KC), self._linear(scale * up_RK.float())
            updates[layer].append(Update(start, stop, down, up))
        salt = next(_numbers).to_bytes(8, "big")
        self._loaded[name] = LoadedAdapter(name, salt, dict(updates))

    def unload(self, name: str) -> None:
        if self._loaded.pop(name, None) is None:
            raise ConfigError(f"no adapter {name!r} is loaded", hint=f"loaded: {self._shown()}")

    def __getitem__(self, name: str) -> LoadedAdapter:
        found = self._loaded.get(name)
        if found is None:
            raise RequestError(f"no adapter {name!r} is loaded", hint=f"loaded: {self._shown()}")
        return found

    def begin(self, slices: Sequence[Slice], first_rows: Sequence[int]) -> None:
        """Say which rows of the step to come belong to which adapter."""
        rows: dict[LoadedAdapter, list[int]] = defaultdict(list)
        for planned, first in zip(slices, first_rows, strict=True):
            if isinstance(planned.sequence.adapter, LoadedAdapter):
                rows[planned.sequence.adapter] += range(first, first + planned.end - planned.start)
        self._rows.groups = [
            (adapter, torch.tensor(each, device=self._device)) for adapter, each in rows.items()
        ]

    def _shown(self) -> str:
        return ", ".join(self._loaded) or "none"

    def _linear(self, weight_RC: Tensor) -> nn.Module:
        rows, cols = weight_RC.shape
        layer = nn.Linear(cols, rows, bias=False, device="meta")
        weight_RC = weight_RC.to(self._device, self._dtype).contiguous()
        layer.weight = nn.Parameter(weight_RC, requires_grad=False)
        return PackedLinear(layer) if self._is_packed else layer


def lora_factors(
    path: Path, base: Checkpoint, *, force: bool = False
) -> dict[str, tuple[float, Tensor, Tensor]]:
    """Weight name -> scale, A [rank, in] and B [out, rank]."""
    merged = MergedCheckpoint(base, path, force=force)  # refuses what is of another base or has no place
    if merged.prompt_format() != base.prompt_format():
        raise CheckpointError(
            f"{path}: trained in another prompt format than the base's, which all requests are written in",
            hint="serve it alone: --adapter PATH without a name",
        )
    if is_nemo_adapter(path):
        lora = read_nemo_lora(path, base.config)
        return {weight: (lora.scale, *pair) for weight, pair in lora.factors.items()}
    is_ia3 = adapter_type(path) == IA3
    config = AdapterConfig(kind="lora") if is_ia3 else read_adapter_config(path)
    if is_ia3 or config.use_dora or config.modules_to_save or has_reward_head(path):
        raise CheckpointError(
            f"{path}: more than LoRA (DoRA, (IA)3, modules_to_save, a reward head): merged only",
            hint="--adapter PATH without a name merges it into the weights",
        )
    tensors = load_file(path / WEIGHTS_FILE)
    found = {}
    for name, down_KC in tensors.items():
        if name.endswith(".lora_A.weight"):
            weight = name.removeprefix(PEFT_PREFIX).replace(".lora_A.", ".")
            found[weight] = (config.scale, down_KC, tensors[name.replace(".lora_A.", ".lora_B.")])
    return found


def _products(block: Block, config: ModelConfig) -> Iterator[tuple[nn.Module, str, dict[str, int]]]:
    """(module, attribute, width of each weight in it) of every product of a block."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = block.self_attn
    mlp: nn.Module = block.mlp  # perhaps replaced by its packed form
    widths = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    if isinstance(attention, PackedAttention):
        yield attention, "qkv_proj", widths
        yield attention, "packed_o_proj", {"self_attn.o_proj": hidden}
    else:
        for name, width in {**widths, "self_attn.o_proj": hidden}.items():
            yield attention, name.removeprefix("self_attn."), {name: width}
    if isinstance(mlp, PackedSwiGluMLP):
        yield mlp, "gate_up_proj", {"mlp.gate_proj": ffn, "mlp.up_proj": ffn}
    else:
        names = ("up_proj",) if config.mlp == "relu2" else ("gate_proj", "up_proj")
        for name in names:
            yield mlp, name, {f"mlp.{name}": ffn}
    yield mlp, "down_proj", {"mlp.down_proj": hidden}
