"""Metadata of a GGUF file, architectures nemotron and llama, as a ModelConfig."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from nemotron4.checkpoint.gguf_file import GgufFile
from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.model.config import ModelConfig, RopeScaling

ROPE_FACTORS = "rope_freqs.weight"


def model_config(file: GgufFile) -> ModelConfig:
    """The decoder that the metadata describes; an error for whatever the decoder cannot compute."""
    path, metadata = file.path, file.metadata
    kind = metadata.get("general.architecture")
    if kind not in ("nemotron", "llama"):
        raise CheckpointError(
            f"{path}: architecture is {kind!r}; readable: nemotron, llama",
            hint="this decoder computes the Nemotron-4 and the Llama block, nothing else",
        )

    def number(key: str, default: float | None = None) -> float:
        value = metadata.get(f"{kind}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path}: {kind}.{key} is {value!r}; expected a number")
        return value

    def integer(key: str, default: int | None = None) -> int:
        value = metadata.get(f"{kind}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{path}: {kind}.{key} is {value!r}; expected an integer")
        return value

    is_nemotron = kind == "nemotron"
    if integer("expert_count", 0):
        raise CheckpointError(
            f"{path}: {kind}.expert_count is {integer('expert_count')}; expected a dense model"
        )
    hidden_size, num_heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", _rows(file, "blk.0.attn_q.weight") // max(num_heads, 1))
    if integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{path}: keys and values have different lengths; expected one head dim")
    rotary_dim = integer("rope.dimension_count", head_dim)
    eps = "attention.layer_norm_epsilon" if is_nemotron else "attention.layer_norm_rms_epsilon"
    try:
        return ModelConfig(
            num_layers=integer("block_count"),
            hidden_size=hidden_size,
            ffn_hidden_size=integer("feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            vocab_size=_rows(file, "token_embd.weight"),
            context_length=integer("context_length"),
            norm="layernorm1p" if is_nemotron else "rmsnorm",
            norm_eps=_shortest(number(eps)),
            mlp="relu2" if is_nemotron else "swiglu",
            rotary_fraction=_rotary_fraction(path, is_nemotron, rotary_dim, head_dim, hidden_size, num_heads),
            rope_theta=_shortest(number("rope.freq_base", 10000.0)),
            rope_scaling=_rope_scaling(file, kind),
            tie_embeddings="output.weight" not in file.tensors,
            attention_bias="blk.0.attn_q.bias" in file.tensors,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error


def _rows(file: GgufFile, name: str) -> int:
    tensor = file.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}; expected a matrix"
        raise CheckpointError(f"{file.path}: tensor {name!r} is {found}")
    return tensor.shape[0]


def _shortest(value: float) -> float:
    """The decimal that a float32 was written from: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _rotary_fraction(
    path: Path, is_nemotron: bool, rotary_dim: int, head_dim: int, hidden_size: int, num_heads: int
) -> float:
    if not is_nemotron:
        if rotary_dim != head_dim:
            raise CheckpointError(
                f"{path}: llama.rope.dimension_count is {rotary_dim}; expected the head dim, {head_dim}"
            )
        return 1.0
    # The converter computes int(fraction * hidden) // heads, which is wrong where head_dim is not
    # hidden / heads (Minitron-8B: 42 for 64). Every such model of the family rotates half of each head.
    if head_dim * num_heads != hidden_size and rotary_dim == hidden_size // 2 // num_heads:
        return 0.5
    fraction = rotary_dim / head_dim
    return fraction if int(head_dim * fraction) == rotary_dim else math.nextafter(fraction, 1.0)


def _rope_scaling(file: GgufFile, kind: str) -> RopeScaling | None:
    scaling = file.metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise CheckpointError(f"{file.path}: RoPE scaling of kind {scaling!r}; readable: none, linear")
    if ROPE_FACTORS in file.tensors:
        if scaling != "none":
            raise CheckpointError(
                f"{file.path}: RoPE scaling of kind {scaling!r} and {ROPE_FACTORS!r} together"
            )
        return RopeScaling(kind="factors", factors=_rope_factors(file))
    if scaling == "none":
        return None
    return RopeScaling(kind="linear", factor=float(file.metadata.get(f"{kind}.rope.scaling.factor", 1.0)))


def _rope_factors(file: GgufFile) -> tuple[float, ...]:
    """What the frequency of each rotated pair is divided by: llama3's scaling as llama.cpp stores it."""
    stored = file.tensors[ROPE_FACTORS]
    if stored.kind != GGMLQuantizationType.F32 or len(stored.shape) != 1:
        raise CheckpointError(
            f"{file.path}: tensor {ROPE_FACTORS!r} is {stored.kind.name} of shape {list(stored.shape)}; "
            "expected a vector of F32"
        )
    values = np.fromfile(file.path, "<f4", count=stored.shape[0], offset=stored.offset)
    if not (values > 0).all():
        raise CheckpointError(f"{file.path}: tensor {ROPE_FACTORS!r} holds factors that are not positive")
    return tuple(values.tolist())
