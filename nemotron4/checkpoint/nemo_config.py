"""The settings of a NeMo checkpoint, and which rows of its tensors make each Hugging Face tensor.

Settings: ``model_config.yaml`` (NeMo 1) or ``context/model.yaml`` (NeMo 2). Only the keys that decide what
the model computes are read. A key that is absent has NeMo's default, which is not Nemotron's: full rotation,
shared embeddings, LayerNorm without the +1.

Names: every weight is a gather of rows. The only one that moves rows is ``linear_qkv``: for group g it holds
the group's query heads, then its key head, then its value head, ``head_dim`` rows each
(Megatron-LM ``core/transformer/attention.py``). LayerNorm1P weights are gamma - 1 on both sides.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nemotron4.checkpoint.hf_config import model_config as hugging_face_config
from nemotron4.checkpoint.nemo_files import NemoFiles
from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.model.config import ModelConfig, RopeScaling
from nemotron4.model.presets import minitron_4b, minitron_8b, nemotron4_15b, nemotron4_340b

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
class RowSource:
    """Rows of one NeMo tensor (of one layer, if it is stacked) that make a Hugging Face tensor."""

    key: str
    layer: int | None
    rows: Rows
    shape: tuple[int, ...]  # of the Hugging Face tensor


def hugging_face_sources(config: ModelConfig) -> dict[str, RowSource]:
    """Every tensor of the model by its Hugging Face name, in the order of the network."""
    d, v = config.hidden_size, config.vocab_size
    found = {"model.embed_tokens.weight": RowSource(EMBEDDING, None, ((0, v),), (v, d))}
    for layer in range(config.num_layers):
        for suffix, source in _layer_sources(config, layer):
            found[f"model.layers.{layer}.{suffix}"] = source
    for name in ("weight", "bias"):
        found[f"model.norm.{name}"] = RowSource(f"decoder.final_layernorm.{name}", None, ((0, d),), (d,))
    if config.num_reward_attributes:
        rows = config.num_reward_attributes
        found["reward_head.weight"] = RowSource(REWARD_HEAD[0], None, ((0, rows),), (rows, d))
        found["reward_head.bias"] = RowSource(REWARD_HEAD[1], None, ((0, rows),), (rows,))
    elif not config.tie_embeddings:
        found["lm_head.weight"] = RowSource(OUTPUT, None, ((0, v),), (v, d))
    return found


def _layer_sources(config: ModelConfig, layer: int) -> Iterator[tuple[str, RowSource]]:
    d, f = config.hidden_size, config.ffn_hidden_size
    q = config.num_heads * config.head_dim
    shapes = {PROJ: (d, q), FC1: (f, d), FC2: (d, f)}
    for part, rows in zip("qkv", qkv_rows(config), strict=True):
        height = sum(stop - start for start, stop in rows)
        yield f"self_attn.{part}_proj.weight", RowSource(QKV, layer, rows, (height, d))
    for suffix, key in LAYER_COPIES.items():
        shape = shapes.get(key, (d,))
        yield suffix, RowSource(key, layer, ((0, shape[0]),), shape)


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
class RowPart:
    """Rows of one Hugging Face tensor, a piece of a NeMo tensor."""

    name: str
    start: int
    stop: int


def nemo_parts(config: ModelConfig) -> dict[str, list[tuple[RowPart, ...]]]:
    """Every NeMo tensor as the Hugging Face rows it is made of: one entry per layer, or one in all.

    The inverse of ``hugging_face_sources``, computed from it.
    """
    pieces: dict[tuple[str, int], list[tuple[int, RowPart]]] = {}
    for name, source in hugging_face_sources(config).items():
        position = 0
        for start, stop in source.rows:
            part = RowPart(name, position, position + stop - start)
            pieces.setdefault((source.key, source.layer or 0), []).append((start, part))
            position += stop - start
    found: dict[str, list[tuple[RowPart, ...]]] = {}
    for (key, _), parts in sorted(pieces.items(), key=lambda item: (item[0][0], item[0][1])):
        found.setdefault(key, []).append(tuple(part for _, part in sorted(parts, key=lambda p: p[0])))
    return found


NEMO1_CONFIG = "model_config.yaml"
NEMO2_CONFIG = "context/model.yaml"
# NeMo 2 writes only what differs from the named class (nemo/collections/llm/gpt/model/nemotron.py).
NEMO2_CLASSES = {
    "NemotronConfig": minitron_4b,
    "Nemotron3Config4B": minitron_4b,
    "Nemotron4Config15B": nemotron4_15b,
    "Nemotron4Config340B": nemotron4_340b,
    "MinitronConfig8B": minitron_8b,
}
INTERPOLATION = re.compile(r"\$\{\.?(?:model\.)?(\w+)\}")


@dataclass(frozen=True)
class NemoSettings:
    """The parsed yaml: where it came from and its values, NeMo 1 at the top, NeMo 2 under ``config``."""

    where: str
    values: Mapping[str, Any]
    is_nemo2: bool
    config_json: Mapping[str, Any] | None = None  # Megatron's names next to Hugging Face's configuration

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name, default)
        if isinstance(value, str) and "${" in value:
            match = INTERPOLATION.fullmatch(value)
            if match is None or match[1] == name:
                raise CheckpointError(
                    f"{self.where}: {name} is {value!r}; expected a value",
                    hint="write the number in place of the interpolation",
                )
            return self.get(match[1])
        return value

    def section(self, name: str) -> NemoSettings:
        """The settings below a key; none if it is absent."""
        value = self.get(name) or {}
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.where}: {name} is {value!r}; expected a mapping")
        return NemoSettings(f"{self.where}: {name}", value, self.is_nemo2)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.where}: {name} is {value!r}; expected a number")
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.number(name, default)
        if not isinstance(value, int):
            raise CheckpointError(f"{self.where}: {name} is {value!r}; expected an integer")
        return value

    def require(self, name: str, default: Any, accepted: tuple[Any, ...], meaning: str) -> None:
        """The setting must have one of the accepted values; ``default`` is NeMo's for an absent key."""
        value = self.get(name, default)
        if value not in accepted:
            state = "absent, which means" if name not in self.values else "set to"
            expected = " or ".join(map(repr, accepted))
            raise CheckpointError(
                f"{self.where}: {name} is {state} {value!r}; expected {expected} ({meaning})",
                hint="only the Nemotron-4 family is read from NeMo checkpoints",
            )


def read_settings(files: NemoFiles) -> NemoSettings:
    """Parse the checkpoint's yaml with the safe loader: no tag of it can build an object."""
    for name in (NEMO1_CONFIG, NEMO2_CONFIG):
        if name in files:
            break
    else:
        if "config.json" in files:
            return _from_config_json(files)
        raise CheckpointError(
            f"{files.source}: neither {NEMO1_CONFIG} nor {NEMO2_CONFIG} is there",
            hint="give the extracted .nemo directory, the .nemo file, or a NeMo 2 checkpoint directory",
        )
    where = f"{files.source}: {name}"
    try:
        values = yaml.load(files.read(name, limit_bytes=16 * 1024**2), Loader=_PlainLoader)
    except yaml.YAMLError as error:
        raise CheckpointError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: expected a mapping of settings")
    return NemoSettings(where, values, is_nemo2=name == NEMO2_CONFIG)


def _from_config_json(files: NemoFiles) -> NemoSettings:
    where = f"{files.source}: config.json"
    try:
        values = json.loads(files.read("config.json", limit_bytes=16 * 1024**2))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: expected a JSON object")
    return NemoSettings(where, {}, is_nemo2=False, config_json=values)


class _PlainLoader(yaml.SafeLoader):
    """The safe loader, for files that also carry tags of Python objects: those become None."""


def _no_object(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> None:
    return None


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _no_object)


def model_config(settings: NemoSettings, *, vocab_size: int, num_reward_attributes: int) -> ModelConfig:
    """The shape that the yaml describes. The vocabulary comes from the embedding's rows and the tokenizer."""
    if settings.config_json is not None:
        config, _ = hugging_face_config(settings.config_json, Path(settings.where))
        return replace(config, vocab_size=vocab_size, num_reward_attributes=num_reward_attributes)
    try:
        build = _nemo2_config if settings.is_nemo2 else _nemo1_config
        return replace(
            build(settings, vocab_size), vocab_size=vocab_size, num_reward_attributes=num_reward_attributes
        )
    except ConfigError as error:
        raise CheckpointError(f"{settings.where}: {error.message}") from error


def _nemo1_config(settings: NemoSettings, vocab_size: int) -> ModelConfig:
    settings.require("normalization", "layernorm", ("layernorm1p",), "LayerNorm with stored gamma - 1")
    settings.require("activation", "gelu", ("squared-relu", "squared_relu"), "un-gated squared ReLU")
    settings.require("bias", True, (False,), "no bias in linear layers")
    settings.require("position_embedding_type", "learned_absolute", ("rope",), "rotary positions")
    settings.require("rotary_interleaved", False, (False, None), "rotate-half pairs")
    settings.require("share_embeddings_and_output_weights", True, (True, False), "a boolean")
    hidden_size = settings.integer("hidden_size")
    num_heads = settings.integer("num_attention_heads")
    return ModelConfig(
        num_layers=settings.integer("num_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=settings.integer("ffn_hidden_size"),
        num_heads=num_heads,
        num_kv_heads=settings.get("num_query_groups") or num_heads,
        head_dim=settings.get("kv_channels") or hidden_size // num_heads,
        vocab_size=vocab_size,
        context_length=settings.integer("max_position_embeddings", settings.get("encoder_seq_length")),
        norm_eps=settings.number("layernorm_epsilon", 1e-5),
        rotary_fraction=settings.number("rotary_percentage", 1.0),
        rope_theta=float(settings.number("rotary_base", 10000)),
        rope_scaling=_scaling(settings),
        tie_embeddings=settings.get("share_embeddings_and_output_weights", True),
        init_std=settings.number("init_method_std", 0.02),
    )


def _nemo2_config(settings: NemoSettings, vocab_size: int) -> ModelConfig:
    inner = settings.get("config")
    if not isinstance(inner, dict):
        raise CheckpointError(f"{settings.where}: config is {inner!r}; expected the model's settings")
    settings = NemoSettings(f"{settings.where}: config", inner, is_nemo2=True)
    kind = str(settings.get("_target_", "")).rpartition(".")[2]
    if kind not in NEMO2_CLASSES:
        raise CheckpointError(
            f"{settings.where}: _target_ is {settings.get('_target_')!r}; expected one of "
            f"{', '.join(NEMO2_CLASSES)}"
        )
    base = NEMO2_CLASSES[kind]()
    settings.require("normalization", "LayerNorm", ("LayerNorm",), "LayerNorm with stored gamma - 1")
    settings.require("layernorm_zero_centered_gamma", True, (True,), "stored gamma - 1")
    settings.require("add_bias_linear", False, (False,), "no bias in linear layers")
    settings.require("gated_linear_unit", False, (False,), "un-gated squared ReLU")
    settings.require("position_embedding_type", "rope", ("rope",), "rotary positions")
    settings.require("rotary_interleaved", False, (False, None), "rotate-half pairs")
    hidden_size = settings.integer("hidden_size", base.hidden_size)
    num_heads = settings.integer("num_attention_heads", base.num_heads)
    if "kv_channels" in settings.values:
        head_dim = settings.get("kv_channels") or hidden_size // num_heads
    else:
        same_shape = (hidden_size, num_heads) == (base.hidden_size, base.num_heads)
        head_dim = base.head_dim if same_shape else hidden_size // num_heads
    return ModelConfig(
        num_layers=settings.integer("num_layers", base.num_layers),
        hidden_size=hidden_size,
        ffn_hidden_size=settings.integer("ffn_hidden_size", base.ffn_hidden_size),
        num_heads=num_heads,
        num_kv_heads=settings.get("num_query_groups", base.num_kv_heads) or num_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        context_length=settings.integer("seq_length", base.context_length),
        norm_eps=settings.number("layernorm_epsilon", 1e-5),
        rotary_fraction=settings.number("rotary_percent", base.rotary_fraction),
        rope_theta=float(settings.number("rotary_base", 10000)),
        rope_scaling=_scaling(settings),
        tie_embeddings=settings.get("share_embeddings_and_output_weights", False),
        init_std=settings.number("init_method_std", base.init_std),
    )


def _scaling(settings: NemoSettings) -> RopeScaling | None:
    factor = settings.get("seq_len_interpolation_factor")
    return None if factor in (None, 1, 1.0) else RopeScaling(kind="linear", factor=float(factor))


def tokenizer_file(settings: NemoSettings, files: NemoFiles) -> str | None:
    """Name of the tokenizer inside the checkpoint, or None if it carries none.

    NeMo 1 names it in the yaml (``nemo:<uuid>_<name>``); a path outside the checkpoint is never followed.
    """
    tokenizer = settings.get("tokenizer")
    tokenizer = tokenizer if isinstance(tokenizer, dict) else {}
    fields = ("model", "tokenizer_model", "model_path", "pretrained_model_name")
    given = [value for field in fields if isinstance(value := tokenizer.get(field), str) and value]
    folder = "context/" if settings.is_nemo2 else ""
    for value in given:
        name = posixpath.basename(value.removeprefix("nemo:"))
        for candidate in (f"{folder}{name}", f"{folder}{name}/tokenizer.json"):
            if candidate in files:
                return candidate
    found = [
        name
        for name in files.names
        if posixpath.dirname(name) in (folder.rstrip("/"), "context/nemo_tokenizer")
        and (name.endswith(".model") or posixpath.basename(name) == "tokenizer.json")
    ]
    if len(found) == 1 or (settings.config_json is not None and found):
        return min(found, key=lambda name: name.endswith(".json"))  # SentencePiece's own file first
    if given and not settings.is_nemo2:
        raise CheckpointError(
            f"{settings.where}: tokenizer {given[0]!r} is not in the checkpoint",
            hint=f"put the file {posixpath.basename(given[0].removeprefix('nemo:'))} next to {NEMO1_CONFIG}",
        )
    return None
