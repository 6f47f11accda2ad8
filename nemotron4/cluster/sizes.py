"""Every tensor of a decoder with its part, its split and its bytes: what all other figures are summed from.

Tensor parallelism splits the rows of q, k, v, up, gate, embedding and output layer, and the columns of o and
down; norms are whole on every rank. Pipeline parallelism gives each stage equally many layers; the first has
the embedding, the last the final norm and the output layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from nemotron4.cluster.hardware import Dtype

ModelPart = Literal["embedding", "attention", "mlp", "norms", "output"]


class Shape(Protocol):
    """The numbers of ``model.config.ModelConfig`` that decide sizes."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def norm(self) -> str: ...
    @property
    def mlp(self) -> str: ...
    @property
    def tie_embeddings(self) -> bool: ...
    @property
    def attention_bias(self) -> bool: ...
    @property
    def num_reward_attributes(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class KnownShape:
    """The shape of a published model of another family: to plan for, not to build here."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context_length: int
    head_dim: int = 128
    tie_embeddings: bool = False
    has_qkv_bias: bool = False  # Qwen 2.5
    has_qk_norm: bool = False  # Qwen 3
    norm: str = "rmsnorm"
    mlp: str = "swiglu"
    attention_bias: bool = False
    num_reward_attributes: int = 0


@dataclass(frozen=True)
class TensorSize:
    """One tensor. ``split`` is the dim that tensor parallelism cuts, ``layer`` None outside the blocks."""

    name: str
    part: ModelPart
    shape: tuple[int, ...]
    split: int | None
    layer: int | None

    @property
    def is_linear(self) -> bool:
        """Whether eight- and four-bit schemes replace it."""
        return self.layer is not None and len(self.shape) == 2

    def local_shape(self, tensor_parallel: int) -> tuple[int, ...]:
        return tuple(n // tensor_parallel if dim == self.split else n for dim, n in enumerate(self.shape))


@dataclass(frozen=True)
class WeightBytes:
    """What a tensor takes: by the type of the linear layers, or as a checkpoint has it (``stored``)."""

    dtype: Dtype
    stored: Mapping[str, int] = field(default_factory=dict)

    def of(self, tensor: TensorSize, tensor_parallel: int = 1) -> int:
        """Bytes on one rank: 16 bits for everything but linear layers, whose scales count too."""
        local = tensor.local_shape(tensor_parallel)
        count = math.prod(local)
        if tensor.name in self.stored:
            return math.ceil(self.stored[tensor.name] * count / math.prod(tensor.shape))
        if self.dtype == "bf16" or not tensor.is_linear:
            return 2 * count
        if self.dtype == "int4":  # a 16-bit scale for 128 values
            return count // 2 + count // 64
        if self.dtype == "nvfp4":  # an 8-bit scale for 16 values
            return count // 2 + count // 16
        return count + 2 * local[0]  # a 16-bit scale for each row


def tensor_sizes(shape: Shape) -> Iterator[TensorSize]:
    """Every tensor once, under its Hugging Face name."""
    d, v = shape.hidden_size, shape.vocab_size
    yield TensorSize("model.embed_tokens.weight", "embedding", (v, d), 0, None)
    for layer in range(shape.num_layers):
        yield from _layer(shape, layer)
    yield from _norm(shape, "model.norm", None)
    if shape.num_reward_attributes:
        yield TensorSize("reward_head.weight", "output", (shape.num_reward_attributes, d), None, None)
        yield TensorSize("reward_head.bias", "output", (shape.num_reward_attributes,), None, None)
    elif not shape.tie_embeddings:
        yield TensorSize("lm_head.weight", "output", (v, d), 0, None)


def _layer(shape: Shape, layer: int) -> Iterator[TensorSize]:
    d, f = shape.hidden_size, shape.ffn_hidden_size
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    prefix = f"model.layers.{layer}"
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        yield TensorSize(f"{prefix}.self_attn.{name}_proj.weight", "attention", (rows, d), 0, layer)
        if shape.attention_bias or (isinstance(shape, KnownShape) and shape.has_qkv_bias):
            yield TensorSize(f"{prefix}.self_attn.{name}_proj.bias", "attention", (rows,), 0, layer)
    if isinstance(shape, KnownShape) and shape.has_qk_norm:
        for name in "qk":
            yield TensorSize(
                f"{prefix}.self_attn.{name}_norm.weight", "norms", (shape.head_dim,), None, layer
            )
    yield TensorSize(f"{prefix}.self_attn.o_proj.weight", "attention", (d, q), 1, layer)
    if shape.attention_bias:
        yield TensorSize(f"{prefix}.self_attn.o_proj.bias", "attention", (d,), None, layer)
    for name in ("up",) if shape.mlp == "relu2" else ("gate", "up"):
        yield TensorSize(f"{prefix}.mlp.{name}_proj.weight", "mlp", (f, d), 0, layer)
    yield TensorSize(f"{prefix}.mlp.down_proj.weight", "mlp", (d, f), 1, layer)
    yield from _norm(shape, f"{prefix}.input_layernorm", layer)
    yield from _norm(shape, f"{prefix}.post_attention_layernorm", layer)


def _norm(shape: Shape, name: str, layer: int | None) -> Iterator[TensorSize]:
    yield TensorSize(f"{name}.weight", "norms", (shape.hidden_size,), None, layer)
    if shape.norm == "layernorm1p":
        yield TensorSize(f"{name}.bias", "norms", (shape.hidden_size,), None, layer)


def stage_tensors(shape: Shape, stage: int, pipeline_parallel: int) -> list[TensorSize]:
    """The tensors of one pipeline stage. A tied embedding is on the first and on the last."""
    per_stage = shape.num_layers // pipeline_parallel
    last = pipeline_parallel - 1

    def is_here(tensor: TensorSize) -> bool:
        if tensor.layer is not None:
            return tensor.layer // per_stage == stage
        if tensor.part == "embedding":
            return stage == 0 or (shape.tie_embeddings and stage == last)
        return stage == last

    return [tensor for tensor in tensor_sizes(shape) if is_here(tensor)]


def num_parameters(shape: Shape) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensor_sizes(shape))


def bytes_by_part(shape: Shape, weights: WeightBytes) -> dict[ModelPart, int]:
    """Weights of the whole model by part."""
    found: dict[ModelPart, int] = {}
    for tensor in tensor_sizes(shape):
        found[tensor.part] = found.get(tensor.part, 0) + weights.of(tensor)
    return found
