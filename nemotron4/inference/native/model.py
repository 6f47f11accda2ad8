"""A checkpoint's weights in the library's own order, and the cache next to them.

Shape suffixes: N = packed rows, R = rows with logits, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron4.checkpoint.interface import Array, Checkpoint, float_rows
from nemotron4.checkpoint.match import check_language_model
from nemotron4.inference.native import library as c
from nemotron4.inference.native.library import Form
from nemotron4.model.config import ModelConfig
from nemotron4.model.rotary import rotary_factor, rotary_frequencies

# Kinds of GGUF blocks that are taken as they are stored -> their number there and the kind they become.
STORED = {
    "Q4_0": (2, Form.U4),
    "Q4_1": (3, Form.U4),
    "Q8_0": (8, Form.S8),
    "Q4_K": (12, Form.U4),
}
NUM_WIDE_LAYERS = 3  # the first ones, whose feed-forward blocks have the largest values
FEW_ROWS = 4  # up to which zeros of squared ReLU are left out: LISTED of native.h
ROWS_AT_ONCE = 4096  # rows of a weight that are float32 at the same time


@dataclass
class Weight:
    """One product's weight: several tensors of the checkpoint below one another."""

    kind: Form
    rows: int
    cols: int
    codes: Array
    scales: Array | None
    bias: Array | None
    is_wide: bool = False  # what enters has fifteen bits instead of eight
    is_by_input: bool = False  # the codes of a column lie side by side, for rows with many zeros

    @staticmethod
    def empty(
        kind: Form, rows: int, cols: int, memory: Memory | None = None, *, is_by_input: bool = False
    ) -> Weight:
        memory = memory or Memory()
        panels, padded = -(-rows // c.PANEL), _to(c.GROUP, cols)
        if is_by_input:
            panels = _to(8, panels)
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
            scales = memory.take(2 * (numbers // c.GROUP) * per_group).view(np.uint16)
        return Weight(kind, rows, cols, memory.take(size), scales, None, is_by_input=is_by_input)

    def as_c(self) -> c.CWeight:
        panels, padded = -(-self.rows // c.PANEL), _to(c.GROUP, self.cols)
        return c.CWeight(
            self.kind, self.rows, self.cols, panels, padded, self.is_wide, self.is_by_input,
            pointer(self.codes), pointer(self.scales), pointer(self.bias),
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (self.codes, self.scales, self.bias) if array is not None)


def _to(multiple: int, count: int) -> int:
    return -(-count // multiple) * multiple


def pointer(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


def _zeros(num_bytes: int) -> Array:
    """Bytes that read as zeros and are taken from the system when first written.

    Weights and cache are read from front to back: large pages, where the system has them, spare a look into
    the page table every 4 KB. It gives them to private memory only.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, max(1, num_bytes), flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, num_bytes)


class Memory:
    """Room for many weights side by side: a large page holds several, or parts of two."""

    CHUNK = 32 << 20

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = _zeros(0)
        self._used = 0

    def take(self, num_bytes: int) -> Array:
        """Bytes that read as zeros and begin at a line of the processor's cache."""
        with self._lock:
            if self._used + num_bytes > len(self._chunk):
                self._chunk = _zeros(max(self.CHUNK, num_bytes))
                self._used = 0
            start, self._used = self._used, _to(64, self._used + num_bytes)
            return self._chunk[start : start + num_bytes]


def packed(rows_RC: Array, kind: Form, memory: Memory | None = None, *, is_by_input: bool = False) -> Weight:
    """A weight of float32 rows."""
    rows, cols = rows_RC.shape
    weight = Weight.empty(kind, rows, cols, memory, is_by_input=is_by_input)
    c.library().native_pack(weight.as_c(), pointer(rows_RC), 0, len(rows_RC))
    return weight


class NativeCache:
    """``num_blocks`` blocks of 32 positions, by head; native.h says where each number lies."""

    block_size = c.BLOCK
    is_read_in_place = True

    def __init__(self, config: ModelConfig, num_blocks: int, kind: Form) -> None:
        self.num_blocks = num_blocks
        self.kind = kind
        dtype = np.dtype({Form.F32: np.float32, Form.BF16: np.uint16, Form.S8: np.uint8}[kind])
        shape = (num_blocks, config.num_layers, config.num_kv_heads, c.BLOCK)
        widths = [config.head_dim if kind == Form.F32 else _to(32, config.head_dim), _to(16, config.head_dim)]
        if kind == Form.S8:  # a position's scale, float32
            widths = [width + 4 for width in widths]
        self.keys, self.values = (
            _zeros(math.prod(shape) * width * dtype.itemsize).view(dtype).reshape(*shape, width)
            for width in widths
        )


class NativeModel:
    """The library's model, its weights and its cache. One thread at a time may call it."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Weight],
        norms: dict[str, tuple[Array, Array | None]],
        embedding: Array | None,
        cache: NativeCache,
        *,
        num_threads: int,
        virtual_rows: Array | None = None,
    ) -> None:
        self.config = config
        self.cache = cache
        self.weights = weights
        self.embedding = embedding
        self._library = c.library()
        frequencies = rotary_frequencies(config)
        self._kept: list[Any] = [norms, virtual_rows, frequencies]
        layers = (c.CLayer * config.num_layers)()
        for i, layer in enumerate(layers):
            _fill_layer(layer, f"model.layers.{i}.", weights, norms)
        self._kept.append(layers)
        model = c.CModel(
            config.num_layers, config.hidden_size, config.ffn_hidden_size, config.num_heads,
            config.num_kv_heads, config.head_dim, config.vocab_size, config.rotary_dim,
            config.mlp == "swiglu", config.norm_eps, layers, _norm(norms["model.norm"]),
            weights["lm_head"].as_c(), pointer(embedding),
            embedding is not None and embedding.dtype == np.uint16, pointer(virtual_rows),
            pointer(frequencies), rotary_factor(config), cache.kind, pointer(cache.keys),
            pointer(cache.values),
        )  # fmt: skip
        self.handle = self._library.native_open(
            ctypes.byref(model), num_threads, c.instruction_set().encode()
        )
        assert self.handle, "the instruction set was loaded before"
        weakref.finalize(self, self._library.native_close, self.handle)

    def step(self, step: c.CStep) -> None:
        self._library.native_step(self.handle, ctypes.byref(step))

    def run_on(self, step: c.CStep, draws: ctypes.Array[c.CDraw], stops: Collection[int]) -> list[int]:
        """The tokens of one sequence that goes on by itself, up to one of ``stops``."""
        ids = (ctypes.c_int32 * len(stops))(*stops)
        count = self._library.native_run_on(
            self.handle, ctypes.byref(step), draws, len(draws), ids, len(stops)
        )
        return [each.token for each in draws[:count]]

    def logits(self, hidden_RD: Array) -> Array:
        """(R, D) after the final norm -> (R, V)."""
        hidden_RD = np.ascontiguousarray(hidden_RD)
        out_RV = np.empty((len(hidden_RD), self.config.vocab_size), np.float32)
        self._library.native_logits(self.handle, pointer(hidden_RD), len(hidden_RD), pointer(out_RV))
        return out_RV


def _norm(pair: tuple[Array, Array | None]) -> c.CNorm:
    return c.CNorm(pointer(pair[0]), pointer(pair[1]))


def _fill_layer(
    layer: c.CLayer, prefix: str, weights: dict[str, Weight], norms: dict[str, tuple[Array, Array | None]]
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
    virtual_rows: Array | None = None, is_for_few: bool = False,
) -> NativeModel:  # fmt: skip
    """Every weight of the checkpoint; ``kind`` None takes the blocks of a GGUF file as they are stored.

    The output layer has eight bits where the others have four: it is what four bits would hurt most.
    ``is_for_few``: at most four rows are decoded together; more take longer than without.
    """
    config = checkpoint.config
    names = set(check_language_model(checkpoint))
    reader = _Reader(checkpoint, kind, is_for_few=is_for_few)
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
    for name, weight in weights.items():
        weight.is_wide = keeps_wide(name, kind)
    norms = {
        name.removesuffix(".weight"): reader.norm(name.removesuffix(".weight"))
        for name in names
        if name.endswith("norm.weight")
    }
    embedding = None
    if not config.tie_embeddings:
        embedding = reader.embedding(is_bf16=kind != Form.F32)
    return NativeModel(
        config, weights, norms, embedding, cache, num_threads=num_threads, virtual_rows=virtual_rows,
    )  # fmt: skip


def keeps_wide(name: str, kind: Form | None) -> bool:
    """Whether rows have fifteen bits when they meet this quantised weight, and not eight.

    That is where eight would hurt most for the time they save: docs/engine.md has the figures.
    """
    if kind in (Form.F32, Form.BF16):
        return False
    _, is_mlp, _ = name.partition(".mlp.")
    return not is_mlp or int(name.split(".")[2]) < NUM_WIDE_LAYERS


def has_zeros(name: str, kind: Form, config: ModelConfig) -> bool:
    """Whether many of the numbers that meet this quantised weight are zero: those behind a squared ReLU."""
    return name.endswith("mlp.down_proj") and config.mlp == "relu2" and kind in (Form.S8, Form.U4)


class _Reader:
    def __init__(self, checkpoint: Checkpoint, kind: Form | None, *, is_for_few: bool) -> None:
        self._is_for_few = is_for_few
        self._checkpoint = checkpoint
        self._kind = kind
        self._memory = Memory()
        self._library = c.library()

    def kind_of(self, name: str, *, is_head: bool = False) -> Form:
        if self._kind is None:
            raw = self._checkpoint.raw_tensor(name + ".weight", 0, 0)
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
        kind = self.kind_of(names[0], is_head=is_head)
        weight = Weight.empty(
            kind, sum(i.shape[0] for i in infos), infos[0].shape[1], self._memory,
            is_by_input=self._is_for_few and has_zeros(names[0], kind, checkpoint.config),
        )  # fmt: skip
        row = 0
        for name, info in zip(names, infos, strict=True):
            self._pack(weight, name + ".weight", row, info.shape[0])
            row += info.shape[0]
        biases = [f"{name}.bias" for name in names]
        if any(bias in all_names for bias in biases):
            weight.bias = np.concatenate([self._floats(bias) for bias in biases])
        return weight

    def _pack(self, weight: Weight, name: str, first: int, count: int) -> None:
        checkpoint, target = self._checkpoint, weight.as_c()
        for start in range(0, count, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, count)
            raw = checkpoint.raw_tensor(name, start, stop) if self._kind is None else None
            if raw is not None and raw.kind in STORED:
                blocks_RX = np.ascontiguousarray(raw.data_RX)
                is_known = self._library.native_pack_gguf(
                    target, STORED[raw.kind][0], pointer(blocks_RX), first + start, stop - start
                )
                assert is_known, raw.kind
                continue
            rows = float_rows(checkpoint, name, start, stop)
            self._library.native_pack(target, pointer(rows), first + start, stop - start)

    def _floats(self, name: str) -> Array:
        return float_rows(self._checkpoint, name, 0, self._checkpoint.tensors[name].shape[0])

    def embedding(self, *, is_bf16: bool) -> Array:
        """The rows of the tokens; float32, or the upper half of it, rounded to the nearest."""
        name = "model.embed_tokens.weight"
        rows, columns = self._checkpoint.tensors[name].shape
        table = np.empty((rows, columns), np.uint16 if is_bf16 else np.float32)
        for start in range(0, rows, ROWS_AT_ONCE):
            values = float_rows(self._checkpoint, name, start, min(start + ROWS_AT_ONCE, rows))
            if is_bf16:
                bits = values.view(np.uint32)
                values = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            table[start : start + ROWS_AT_ONCE] = values
        return table

    def norm(self, name: str) -> tuple[Array, Array | None]:
        weight = self._floats(name + ".weight")
        if self._checkpoint.config.norm == "rmsnorm":
            return weight, None
        return weight + 1, self._floats(name + ".bias")
