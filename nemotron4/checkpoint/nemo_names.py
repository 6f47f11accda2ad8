"""Which rows of which NeMo tensor make each Hugging Face tensor, and the other way round.

Every weight is a gather of rows. The only one that moves rows is ``linear_qkv``: for group g it holds the
group's query heads, then its key head, then its value head, ``head_dim`` rows each
(Megatron-LM ``core/transformer/attention.py``). LayerNorm1P weights are gamma - 1 on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemotron4.model.config import ModelConfig

Rows = tuple[tuple[int, int], ...]  # half-open row ranges, in order

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
QKV = "decoder.layers.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.self_attention.linear_proj.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
REWARD_HEAD = ("rm_head.weight", "rm_head.bias")

# Hugging Face suffix of a layer -> NeMo key, for what is copied unchanged.
LAYER_COPIES = {
    "self_attn.o_proj.weight": PROJ,
    "mlp.up_proj.weight": FC1,
    "mlp.down_proj.weight": FC2,
    "input_layernorm.weight": "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "decoder.layers.self_attention.linear_qkv.layer_norm_bias",
    "post_attention_layernorm.weight": "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "post_attention_layernorm.bias": "decoder.layers.mlp.linear_fc1.layer_norm_bias",
}
# NeMo key -> the dim that tensor parallelism splits, in one layer's [rows, columns].
SPLIT_DIM = {EMBEDDING: 0, OUTPUT: 0, QKV: 0, FC1: 0, PROJ: 1, FC2: 1, REWARD_HEAD[0]: 1}


@dataclass(frozen=True)
class Source:
    """Rows of one NeMo tensor (of one layer, if it is stacked) that make a Hugging Face tensor."""

    key: str
    layer: int | None
    rows: Rows
    shape: tuple[int, ...]  # of the Hugging Face tensor


def hugging_face_sources(config: ModelConfig) -> dict[str, Source]:
    """Every tensor of the model by its Hugging Face name, in the order of the network."""
    d, v = config.hidden_size, config.vocab_size
    found = {"model.embed_tokens.weight": Source(EMBEDDING, None, ((0, v),), (v, d))}
    for layer in range(config.num_layers):
        for suffix, source in _layer_sources(config, layer):
            found[f"model.layers.{layer}.{suffix}"] = source
    for name in ("weight", "bias"):
        found[f"model.norm.{name}"] = Source(f"decoder.final_layernorm.{name}", None, ((0, d),), (d,))
    if config.num_reward_attributes:
        rows = config.num_reward_attributes
        found["reward_head.weight"] = Source(REWARD_HEAD[0], None, ((0, rows),), (rows, d))
        found["reward_head.bias"] = Source(REWARD_HEAD[1], None, ((0, rows),), (rows,))
    elif not config.tie_embeddings:
        found["lm_head.weight"] = Source(OUTPUT, None, ((0, v),), (v, d))
    return found


def _layer_sources(config: ModelConfig, layer: int) -> Iterator[tuple[str, Source]]:
    d, f = config.hidden_size, config.ffn_hidden_size
    q = config.num_heads * config.head_dim
    shapes = {PROJ: (d, q), FC1: (f, d), FC2: (d, f)}
    for part, rows in zip("qkv", qkv_rows(config), strict=True):
        height = sum(stop - start for start, stop in rows)
        yield f"self_attn.{part}_proj.weight", Source(QKV, layer, rows, (height, d))
    for suffix, key in LAYER_COPIES.items():
        shape = shapes.get(key, (d,))
        yield suffix, Source(key, layer, ((0, shape[0]),), shape)


def qkv_rows(config: ModelConfig) -> tuple[Rows, Rows, Rows]:
    """Rows of ``linear_qkv`` that are the query, the key and the value projection."""
    dim, queries = config.head_dim, config.num_queries_per_kv_head
    starts = [group * (queries + 2) * dim for group in range(config.num_kv_heads)]
    return (
        tuple((start, start + queries * dim) for start in starts),
        tuple((start + queries * dim, start + (queries + 1) * dim) for start in starts),
        tuple((start + (queries + 1) * dim, start + (queries + 2) * dim) for start in starts),
    )


@dataclass(frozen=True)
class Part:
    """Rows of one Hugging Face tensor, a piece of a NeMo tensor."""

    name: str
    start: int
    stop: int


def nemo_parts(config: ModelConfig) -> dict[str, list[tuple[Part, ...]]]:
    """Every NeMo tensor as the Hugging Face rows it is made of: one entry per layer, or one in all.

    The inverse of ``hugging_face_sources``, computed from it.
    """
    pieces: dict[tuple[str, int], list[tuple[int, Part]]] = {}
    for name, source in hugging_face_sources(config).items():
        position = 0
        for start, stop in source.rows:
            part = Part(name, position, position + stop - start)
            pieces.setdefault((source.key, source.layer or 0), []).append((start, part))
            position += stop - start
    found: dict[str, list[tuple[Part, ...]]] = {}
    for (key, _), parts in sorted(pieces.items(), key=lambda item: (item[0][0], item[0][1])):
        found.setdefault(key, []).append(tuple(part for _, part in sorted(parts, key=lambda p: p[0])))
    return found
