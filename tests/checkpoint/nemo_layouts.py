"""Tiny but structurally true NeMo checkpoints, written from the format's description, not by the product.

Names, stacking, chunk files, metadata and extra-state clutter are those of the 340B release; every pickle
in it fails the test that opens it.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import tarfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemotron4.model.config import ModelConfig
from tests.tiny_models import VOCAB_SIZE, sentencepiece_model

TOKENIZER = "8223bf8eaa194eb8920af568bb52e2d0_megatron_2.model"
EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
SPLIT = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "decoder.layers.self_attention.linear_qkv.weight": 1,
    "decoder.layers.self_attention.linear_proj.weight": 2,
    "decoder.layers.mlp.linear_fc1.weight": 1,
    "decoder.layers.mlp.linear_fc2.weight": 2,
    "rm_head.weight": 1,
}

Tensors = dict[str, torch.Tensor]


class Hostile:
    """A pickle that fails the test when it is loaded."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a pickle was loaded')",)


def tiny_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 96,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 16,  # not hidden / heads, as in Minitron-8B
        "vocab_size": VOCAB_SIZE,
        "context_length": 64,
    }
    return ModelConfig(**values | changes)


def hugging_face_weights(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensors:
    """Random weights under Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype)

    d, f, e, v = config.hidden_size, config.ffn_hidden_size, config.head_dim, config.vocab_size
    found = {"model.embed_tokens.weight": random(v, d)}
    for layer in range(config.num_layers):
        shapes = {
            "self_attn.q_proj.weight": (config.num_heads * e, d),
            "self_attn.k_proj.weight": (config.num_kv_heads * e, d),
            "self_attn.v_proj.weight": (config.num_kv_heads * e, d),
            "self_attn.o_proj.weight": (d, config.num_heads * e),
            "mlp.up_proj.weight": (f, d),
            "mlp.down_proj.weight": (d, f),
            "input_layernorm.weight": (d,),
            "input_layernorm.bias": (d,),
            "post_attention_layernorm.weight": (d,),
            "post_attention_layernorm.bias": (d,),
        }
        found |= {f"model.layers.{layer}.{name}": random(*shape) for name, shape in shapes.items()}
    found |= {"model.norm.weight": random(d), "model.norm.bias": random(d)}
    if config.num_reward_attributes:
        found |= {"reward_head.weight": random(config.num_reward_attributes, d)}
        found |= {"reward_head.bias": random(config.num_reward_attributes)}
    elif not config.tie_embeddings:
        found |= {"lm_head.weight": random(v, d)}
    return found


def megatron_weights(config: ModelConfig, weights: Tensors) -> Tensors:
    """The same weights as Megatron keeps them: fused, interleaved by group, stacked over layers."""

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([weights[f"model.layers.{i}.{name}"] for i in range(config.num_layers)])

    def fused(layer: int) -> torch.Tensor:
        q, k, v = (weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        d, e, groups = config.hidden_size, config.head_dim, config.num_kv_heads
        parts = [q.view(groups, -1, e, d), k.view(groups, 1, e, d), v.view(groups, 1, e, d)]
        return torch.cat(parts, dim=1).reshape(-1, d)

    attention, mlp = "decoder.layers.self_attention", "decoder.layers.mlp"
    found = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        f"{attention}.linear_qkv.weight": torch.stack([fused(i) for i in range(config.num_layers)]),
        f"{attention}.linear_qkv.layer_norm_weight": stacked("input_layernorm.weight"),
        f"{attention}.linear_qkv.layer_norm_bias": stacked("input_layernorm.bias"),
        f"{attention}.linear_proj.weight": stacked("self_attn.o_proj.weight"),
        f"{mlp}.linear_fc1.layer_norm_weight": stacked("post_attention_layernorm.weight"),
        f"{mlp}.linear_fc1.layer_norm_bias": stacked("post_attention_layernorm.bias"),
        f"{mlp}.linear_fc1.weight": stacked("mlp.up_proj.weight"),
        f"{mlp}.linear_fc2.weight": stacked("mlp.down_proj.weight"),
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "decoder.final_layernorm.bias": weights["model.norm.bias"],
    }
    if "lm_head.weight" in weights:
        found["output_layer.weight"] = weights["lm_head.weight"]
    if "reward_head.weight" in weights:
        found |= {f"rm_head.{part}": weights[f"reward_head.{part}"] for part in ("weight", "bias")}
    return found


def settings(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    """``model_config.yaml`` with the clutter that a reader must ignore; None removes a key."""
    values: dict[str, Any] = {
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        "nemo_version": "1.22.0",
        "mcore_gpt": True,
        "micro_batch_size": 1,
        "tensor_model_parallel_size": 8,
        "pipeline_model_parallel_size": 4,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "encoder_seq_length": "${.max_position_embeddings}",
        "max_position_embeddings": config.context_length,
        "position_embedding_type": "rope",
        "rotary_percentage": config.rotary_fraction,
        "normalization": "layernorm1p",
        "layernorm_epsilon": 1e-5,
        "activation": "squared-relu",
        "bias": False,
        "share_embeddings_and_output_weights": config.tie_embeddings,
        "init_method_std": config.init_std,
        "apply_query_key_layer_scaling": True,
        "optim": {"name": "distributed_fused_adam", "lr": 1e-4},
        "tokenizer": {
            "library": "sentencepiece",
            "model": f"nemo:{TOKENIZER}",
            "sentencepiece_legacy": False,
        },
    }
    return {key: value for key, value in (values | changes).items() if value is not ...}


def write_release(
    folder: Path,
    config: ModelConfig,
    weights: Tensors,
    *,
    tensor_parallel: int = 1,
    prefix: str = "model.",
    padding_rows: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """The extracted ``.nemo`` of the release: zarr chunks by tensor parallel rank, layers stacked."""
    _write_settings(folder, settings(config, **(changes or {})))
    weights_folder = folder / "model_weights"
    for key, tensor in megatron_weights(config, weights).items():
        if key in ("embedding.word_embeddings.weight", "output_layer.weight") and padding_rows:
            tensor = torch.cat([tensor, torch.full((padding_rows, tensor.shape[1]), 7.0).to(tensor.dtype)])
        _write_zarr(weights_folder / f"{prefix}{key}", key, tensor, tensor_parallel)
    metadata = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    (weights_folder / "metadata.json").write_text(json.dumps(metadata))
    _write_clutter(weights_folder, prefix, config.num_layers)
    return folder


def _write_settings(folder: Path, values: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(dict(values)))
    (folder / TOKENIZER).write_bytes(sentencepiece_model())


def _write_clutter(folder: Path, prefix: str, num_layers: int) -> None:
    (folder / "common.pt").write_bytes(pickle.dumps(Hostile()))
    for module in EXTRA_STATES:
        place = folder / f"{prefix}decoder.layers.{module}._extra_state"
        place.mkdir()
        for layer in range(num_layers):
            (place / f"shard_{layer}_{num_layers}.pt").write_bytes(pickle.dumps(Hostile()))


def _write_zarr(folder: Path, key: str, tensor: torch.Tensor, tensor_parallel: int) -> None:
    chunk = list(tensor.shape)
    if key in SPLIT:
        chunk[SPLIT[key]] = math.ceil(chunk[SPLIT[key]] / tensor_parallel)
    if key.startswith("decoder.layers."):
        chunk[0] = 1
    dtype = {torch.bfloat16: "bfloat16", torch.float16: "<f2", torch.float32: "<f4"}[tensor.dtype]
    folder.mkdir(parents=True)
    array = {
        "chunks": chunk,
        "compressor": None,
        "dtype": dtype,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(tensor.shape),
        "zarr_format": 2,
    }
    (folder / ".zarray").write_text(json.dumps(array))
    grid = [math.ceil(n / step) for n, step in zip(tensor.shape, chunk, strict=True)]
    for position in product(*map(range, grid)):
        box = torch.zeros(chunk, dtype=tensor.dtype)
        part = tensor[tuple(slice(p * n, (p + 1) * n) for p, n in zip(position, chunk, strict=True))]
        box[tuple(slice(0, n) for n in part.shape)] = part
        (folder / ".".join(map(str, position))).write_bytes(box.view(torch.uint8).numpy().tobytes())


def write_torch_dist(
    folder: Path,
    config: ModelConfig,
    weights: Tensors,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    prefix: str = "model.",
    weights_folder: str = "model_weights",
) -> Path:
    """The later form: one ``.distcp`` per rank and a pickled index made of torch's own classes."""
    _write_settings(folder, settings(config))
    place = folder / weights_folder
    place.mkdir(parents=True)
    files: dict[str, bytearray] = {}
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, tensor in megatron_weights(config, weights).items():
        chunks = []
        for start, part, rank in _rank_parts(key, tensor, tensor_parallel, pipeline_parallel):
            data = io.BytesIO()
            torch.save(part.clone(), data)
            name = f"__{rank}_0.distcp"
            file = files.setdefault(name, bytearray(b"other bytes"))
            index = MetadataIndex(f"{prefix}{key}", torch.Size(start), len(chunks))
            places[index] = _StorageInfo(name, len(file), len(data.getvalue()))
            file += data.getvalue()
            chunks.append(ChunkStorageMetadata(torch.Size(start), part.shape))
        entries[f"{prefix}{key}"] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype), tensor.shape, chunks
        )
    for module in EXTRA_STATES:
        key = f"{prefix}decoder.layers.{module}._extra_state/shard_0_{config.num_layers}"
        entries[key] = BytesStorageMetadata()
        file = files["__0_0.distcp"]
        places[MetadataIndex(key)] = _StorageInfo("__0_0.distcp", len(file), 10)
        file += pickle.dumps(Hostile())
    for name, file in files.items():
        (place / name).write_bytes(file)
    (place / ".metadata").write_bytes(pickle.dumps(Metadata(entries, planner_data={}, storage_data=places)))
    metadata = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (place / "metadata.json").write_text(json.dumps(metadata))
    (place / "common.pt").write_bytes(pickle.dumps(Hostile()))
    return folder


def _rank_parts(key: str, tensor: torch.Tensor, tensor_parallel: int, pipeline_parallel: int) -> Any:
    """(start, part, rank): the layers of each pipeline stage one by one, split over the tensor ranks."""
    layers = tensor.shape[0] if key.startswith("decoder.layers.") else 0
    for layer in range(layers) if layers else [None]:
        stage = 0 if layer is None else layer // (layers // pipeline_parallel)
        part = tensor if layer is None else tensor[layer : layer + 1]
        ranks = tensor_parallel if key in SPLIT else 1
        for rank in range(ranks):
            dim = SPLIT.get(key, 0)
            piece = part.chunk(ranks, dim)[rank] if ranks > 1 else part
            start = [layer or 0, *[0] * (tensor.dim() - 1)] if layers else [0] * tensor.dim()
            if ranks > 1:
                start[dim] += rank * piece.shape[dim]
            yield tuple(start), piece, stage * tensor_parallel + rank


def pack(folder: Path, target: Path, *, compressed: bool = False) -> Path:
    """A ``.nemo`` file of the directory, with ``./`` names as NeMo writes them."""
    with tarfile.open(target, "w:gz" if compressed else "w:") as archive:
        archive.add(folder, arcname=".")
    return target
