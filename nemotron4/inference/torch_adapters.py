"""Adapters next to a base that PyTorch computes: the updates of each row's adapter, around the modules.

Shape suffixes: N = packed rows, K = rank, R and C = rows and columns of a weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.inference.adapters import AdapterBank, Factors, LoadedAdapter, no_place
from nemotron4.inference.packed_linear import (
    PackedAttention,
    PackedLinear,
    PackedSwiGluMLP,
)
from nemotron4.inference.scheduler import Slice
from nemotron4.model.config import ModelConfig
from nemotron4.model.transformer import Block, Transformer


class Update(NamedTuple):
    """What an adapter adds to columns ``start`` to ``stop`` of a product's output."""

    start: int
    stop: int
    down: nn.Module
    up: nn.Module


@dataclass(frozen=True, eq=False)
class ModuleAdapter(LoadedAdapter):
    updates: Mapping[nn.Module, Sequence[Update]]  # by the layer that they belong to


@dataclass
class StepRows:
    """Which rows of the step that is computed now belong to which adapter."""

    groups: list[tuple[ModuleAdapter, Tensor]] = field(default_factory=list)


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


class ModuleAdapters(AdapterBank):
    def __init__(self, model: Transformer, checkpoint: Checkpoint) -> None:
        """Put an ``AdaptedLinear`` around every product of the model, which is packed already or never."""
        super().__init__(checkpoint)
        self._rows = StepRows()
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

    def read(self, name: str, salt: bytes, factors: Mapping[str, Factors], path: str | Path) -> ModuleAdapter:
        updates: dict[nn.Module, list[Update]] = defaultdict(list)
        for weight, (scale, down_KC, up_RK) in factors.items():
            if weight not in self._places:
                raise no_place(path, weight)
            layer, start, stop = self._places[weight]
            down, up = self._linear(down_KC), self._linear(scale * up_RK.float())
            updates[layer].append(Update(start, stop, down, up))
        return ModuleAdapter(name, salt, dict(updates))

    def begin(self, slices: Sequence[Slice], first_rows: Sequence[int]) -> None:
        """Say which rows of the step to come belong to which adapter."""
        rows: dict[ModuleAdapter, list[int]] = defaultdict(list)
        for planned, first in zip(slices, first_rows, strict=True):
            if isinstance(planned.sequence.adapter, ModuleAdapter):
                rows[planned.sequence.adapter] += range(first, first + planned.end - planned.start)
        self._rows.groups = [
            (adapter, torch.tensor(each, device=self._device)) for adapter, each in rows.items()
        ]

    def _linear(self, weight_RC: Tensor) -> nn.Module:
        rows, cols = weight_RC.shape
        layer = nn.Linear(cols, rows, bias=False, device="meta")
        weight_RC = weight_RC.to(self._device, self._dtype).contiguous()
        layer.weight = nn.Parameter(weight_RC, requires_grad=False)
        return PackedLinear(layer) if self._is_packed else layer


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
