"""A checkpoint's weights in the library's own order, and the cache next to them.

Shape suffixes: N = packed rows, R = rows with logits, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.load import match_weights
from nemotron4.inference.native import library as c
from nemotron4.inference.native.library import Form
from nemotron4.model.attention import rotary_frequencies
from nemotron4.model.config import ModelConfig
from nemotron4.model.kv_cache import zeros
from nemotron4.model.transformer import Transformer

# Kinds of GGUF blocks that are taken as they are stored -> their number there and the kind they become.
STORED = {
    "Q4_0": (2, Form.U4),
    "Q4_1": (3, Form.U4),
    "Q8_0": (8, Form.S8),
    "Q4_K": (12, Form.U4),
}
ROWS_AT_ONCE = 4096  # rows of a weight that are float32 at the same time


@dataclass
class Weight:
    """One product's weight: several tensors of the checkpoint below one another."""

    kind: Form
    rows: int
    cols: int
    codes: Tensor
    scales: Tensor | None
    bias: Tensor | None

    @staticmethod
    def empty(kind: Form, rows: int, cols: int) -> Weight:
        panels, padded = -(-rows // c.PANEL), -(-cols // c.GROUP) * c.GROUP
        numbers = panels * c.PANEL * padded
        size = {
            Form.F32: 4 * numbers,
            Form.BF16: 2 * numbers,
            Form.S8: numbers,
            Form.U4: numbers // 2,
        }[kind]
        scales = None
        if kind in (Form.S8, Form.U4):
            per_group = 1 if kind == Form.S8 else 2
            scales = torch.zeros(numbers // c.GROUP * per_group, dtype=torch.int16)
        return Weight(kind, rows, cols, torch.zeros(size, dtype=torch.uint8), scales, None)

    def as_c(self) -> c.CWeight:
        panels, padded = -(-self.rows // c.PANEL), -(-self.cols // c.GROUP) * c.GROUP
        return c.CWeight(
            self.kind, self.rows, self.cols, panels, padded, pointer(self.codes), pointer(self.scales),
            pointer(self.bias),
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        return sum(
            t.numel() * t.element_size() for t in (self.codes, self.scales, self.bias) if t is not None
        )


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class NativeCache:
    """``num_blocks`` blocks of 32 positions; keys lie by dimension, values by position, both by head."""

    block_size = c.BLOCK

    def __init__(self, config: ModelConfig, num_blocks: int, *, dtype: torch.dtype) -> None:
        self.num_blocks = num_blocks
        self.dtype = dtype
        wide = -(-config.head_dim // 16) * 16
        shape = (config.num_layers, num_blocks, config.num_kv_heads, c.BLOCK)
        self.keys = zeros((*shape, config.head_dim), dtype, torch.device("cpu"))
        self.values = zeros((*shape, wide), dtype, torch.device("cpu"))


class NativeModel:
    """The library's model, its weights and its cache. One thread at a time may call it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Weight],
        norms: dict[str, tuple[Tensor, Tensor | None]],
        embedding: Tensor | None,
        cache: NativeCache,
        *,
        num_threads: int,
        is_wide: bool = False,
        virtual_rows: Tensor | None = None,
    ) -> None:
        """``is_wide``: what enters a quantised product has fifteen bits instead of eight."""
        self.config = config
        self.cache = cache
        self.weights = weights
        self._library = c.library()
        frequencies = rotary_frequencies(config).contiguous()
        self._kept: list[Any] = [weights, norms, embedding, virtual_rows, frequencies, cache]
        layers = (c.CLayer * config.num_layers)()
        for i, layer in enumerate(layers):
            _fill_layer(layer, f"model.layers.{i}.", weights, norms)
        self._kept.append(layers)
        model = c.CModel(
            config.num_layers, config.hidden_size, config.ffn_hidden_size, config.num_heads,
            config.num_kv_heads, config.head_dim, config.vocab_size, config.rotary_dim,
            config.mlp == "swiglu", is_wide, config.norm_eps, layers, _norm(norms["model.norm"]),
            weights["lm_head"].as_c(), pointer(embedding),
            embedding is not None and embedding.dtype == torch.bfloat16, pointer(virtual_rows),
            pointer(frequencies), cache.dtype == torch.bfloat16, pointer(cache.keys), pointer(cache.values),
            cache.num_blocks,
        )  # fmt: skip
        self.handle = self._library.native_open(ctypes.byref(model), num_threads, c.wanted_isa())
        assert self.handle, "the instruction set was checked before"
        weakref.finalize(self, self._library.native_close, self.handle)

    def step(self, step: c.CStep) -> None:
        self._library.native_step(self.handle, ctypes.byref(step))

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """(R, D) after the final norm -> (R, V)."""
        hidden_RD = hidden_RD.contiguous()
        out_RV = torch.empty(len(hidden_RD), self.config.vocab_size)
        self._library.native_logits(self.handle, hidden_RD.data_ptr(), len(hidden_RD), out_RV.data_ptr())
        return out_RV


def _norm(pair: tuple[Tensor, Tensor | None]) -> c.CNorm:
    return c.CNorm(pointer(pair[0]), pointer(pair[1]))


def _fill_layer(
    layer: c.CLayer, prefix: str, weights: dict[str, Weight], norms: dict[str, tuple[Tensor, Tensor | None]]
) -> None:
    layer.attention_norm = _norm(norms[prefix + "input_layernorm"])
    layer.mlp_norm = _norm(norms[prefix + "post_attention_layernorm"])
    for field, name in (("qkv", "self_attn.qkv"), ("up", "mlp.up")):
        parts = [weights[key] for i in range(3) if (key := f"{prefix}{name}.{i}") in weights]
        for i, part in enumerate(parts):
            getattr(layer, field)[i] = part.as_c()
        setattr(layer, f"num_{field}", len(parts))
    layer.out = weights[prefix + "self_attn.o_proj"].as_c()
    layer.down = weights[prefix + "mlp.down_proj"].as_c()


# -- from a checkpoint --------------------------------------------------------------------------------------


def read_model(
    checkpoint: Checkpoint, kind: Form | None, cache: NativeCache, *, num_threads: int,
    virtual_rows: Tensor | None = None,
) -> NativeModel:  # fmt: skip
    """Every weight of the checkpoint; ``kind`` None takes the blocks of a GGUF file as they are stored.

    The output layer has eight bits where the others have four: it is what four bits would hurt most. Rows
    that meet stored blocks are wide, so that the result is that of the stored values.
    """
    config = checkpoint.config
    with torch.device("meta"):
        names = set(match_weights(Transformer(config), checkpoint))
    reader = _Reader(checkpoint, kind)
    jobs: dict[str, list[str]] = {}
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}."
        qkv = [f"{prefix}self_attn.{x}_proj" for x in "qkv"]
        gates = ["gate_proj", "up_proj"] if config.mlp == "swiglu" else ["up_proj"]
        for name, parts in (("self_attn.qkv", qkv), ("mlp.up", [f"{prefix}mlp.{x}" for x in gates])):
            for number, group in enumerate(reader.groups(parts)):
                jobs[f"{prefix}{name}.{number}"] = group
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            jobs[prefix + name] = [prefix + name]
    jobs["lm_head"] = ["model.embed_tokens" if config.tie_embeddings else "lm_head"]
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        made = pool.map(lambda job: reader.weight(job[1], names, is_head=job[0] == "lm_head"), jobs.items())
        weights = dict(zip(jobs, made, strict=True))
    norms = {
        name.removesuffix(".weight"): reader.norm(name.removesuffix(".weight"))
        for name in names
        if name.endswith("norm.weight")
    }
    embedding = None
    if not config.tie_embeddings:
        dtype = torch.float32 if kind == Form.F32 else torch.bfloat16
        embedding = checkpoint.read("model.embed_tokens.weight", dtype)
    return NativeModel(
        config, weights, norms, embedding, cache, num_threads=num_threads, is_wide=kind is None,
        virtual_rows=virtual_rows,
    )  # fmt: skip


class _Reader:
    def __init__(self, checkpoint: Checkpoint, kind: Form | None) -> None:
        self._checkpoint = checkpoint
        self._kind = kind
        self._library = c.library()

    def kind_of(self, name: str, *, is_head: bool = False) -> Form:
        if self._kind is None:
            raw = self._checkpoint.raw_tensor(name + ".weight")
            return Form.S8 if raw is None else STORED.get(raw.kind, (0, Form.S8))[1]
        return Form.S8 if is_head and self._kind == Form.U4 else self._kind

    def groups(self, names: list[str]) -> list[list[str]]:
        """Neighbours of one kind together: they become one product."""
        out: list[list[str]] = []
        for name in names:
            if out and self.kind_of(out[-1][0]) == self.kind_of(name):
                out[-1].append(name)
            else:
                out.append([name])
        return out

    def weight(self, names: list[str], all_names: Iterable[str], *, is_head: bool) -> Weight:
        checkpoint = self._checkpoint
        infos = [checkpoint.tensors[name + ".weight"] for name in names]
        weight = Weight.empty(
            self.kind_of(names[0], is_head=is_head), sum(i.shape[0] for i in infos), infos[0].shape[1]
        )
        row = 0
        for name, info in zip(names, infos, strict=True):
            self._pack(weight, name + ".weight", row, info.shape[0])
            row += info.shape[0]
        biases = [f"{name}.bias" for name in names]
        if any(bias in all_names for bias in biases):
            weight.bias = torch.cat([checkpoint.read(bias, torch.float32) for bias in biases])
        return weight

    def _pack(self, weight: Weight, name: str, first: int, count: int) -> None:
        checkpoint, target = self._checkpoint, weight.as_c()
        raw = checkpoint.raw_tensor(name) if self._kind is None else None
        if raw is not None and raw.kind in STORED:
            blocks_RX = np.ascontiguousarray(raw.data_RX)
            is_known = self._library.native_pack_gguf(
                target, STORED[raw.kind][0], blocks_RX.ctypes.data, first, count
            )
            assert is_known, raw.kind
            return
        for start in range(0, count, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, count)
            rows = checkpoint.read_rows(name, start, stop, torch.float32).contiguous()
            self._library.native_pack(target, rows.data_ptr(), first + start, stop - start)

    def norm(self, name: str) -> tuple[Tensor, Tensor | None]:
        weight = self._checkpoint.read(name + ".weight", torch.float32)
        if self._checkpoint.config.norm == "rmsnorm":
            return weight.contiguous(), None
        return weight + 1, self._checkpoint.read(name + ".bias", torch.float32).contiguous()
