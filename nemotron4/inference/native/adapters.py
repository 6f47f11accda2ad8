"""Adapters next to a base that the library computes: their factors in float32, laid out as its weights."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.inference.adapters import AdapterBank, Factors, LoadedAdapter, no_place
from nemotron4.inference.native import library as c
from nemotron4.inference.native.library import Form
from nemotron4.inference.native.model import Memory, Weight, packed

# As native.h numbers them.
PARTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class NativeAdapter(LoadedAdapter):
    layers: ctypes.Array[c.CLayerAdapter]
    kept: list[Weight]  # whose memory ``layers`` point to

    @property
    def address(self) -> int:
        return ctypes.addressof(self.layers)


class NativeAdapters(AdapterBank):
    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = checkpoint.config
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        up = config.ffn_hidden_size if config.mlp == "swiglu" else 0
        self._columns = (0, q, q + kv, 0, 0, up, 0)  # of the product that computes the part
        names = [part for part in PARTS if up or part != "mlp.gate_proj"]
        self._places = {
            f"model.layers.{layer}.{part}.weight": (layer, PARTS.index(part))
            for layer in range(config.num_layers)
            for part in names
        }

    def read(self, name: str, salt: bytes, factors: Mapping[str, Factors], path: str | Path) -> NativeAdapter:
        layers = (c.CLayerAdapter * self._checkpoint.config.num_layers)()
        kept: list[Weight] = []
        memory = Memory()
        for weight, (scale, down_KC, up_RK) in factors.items():
            if weight not in self._places:
                raise no_place(path, weight)
            layer, part = self._places[weight]
            down, up = (
                packed(np.ascontiguousarray(factor.float().numpy()), Form.F32, memory)
                for factor in (down_KC, scale * up_RK.float())
            )
            layers[layer].lows[part] = c.CLow(down.as_c(), up.as_c(), self._columns[part])
            kept += (down, up)
        return NativeAdapter(name, salt, layers, kept)
