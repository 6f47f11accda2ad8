"""A checkpoint as NeMo files: the release layout, an extracted ``.nemo`` with zarr weights.

Chunks are split as tensor parallelism would split them, layers are stacked. There is no ``common.pt``
(a pickle that inference does not need).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
import yaml

from nemotron4.checkpoint.convert_files import Blocks, OutputFile, json_file, small_file
from nemotron4.checkpoint.interface import Checkpoint, row_ranges
from nemotron4.checkpoint.nemo_config import SPLIT_DIM, RowPart, nemo_parts
from nemotron4.checkpoint.nemo_files import as_bytes
from nemotron4.errors import CheckpointError
from nemotron4.model.config import ModelConfig

ZARR_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "<f2", torch.float32: "<f4"}
PRECISION = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed", torch.float32: "32"}
METADATA = {
    "sharded_backend": "zarr",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def nemo_files(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    tokenizer: tuple[str, bytes],
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> list[OutputFile]:
    """Every file of the extracted directory; ``model_config.yaml``, which makes it one, comes last."""
    config = checkpoint.config
    _check_split(config, tensor_parallel, pipeline_parallel)
    files: list[OutputFile] = []
    for key, entries in nemo_parts(config).items():
        is_stacked = entries[0][0].name.startswith("model.layers.")
        files += _tensor_files(checkpoint, key, entries, is_stacked, dtype, tensor_parallel)
    name, data = tokenizer
    settings = nemo_settings(
        config,
        tokenizer=name,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    files.append(json_file("model_weights/metadata.json", METADATA))
    files.append(small_file(name, data))
    files.append(small_file("model_config.yaml", yaml.safe_dump(settings, sort_keys=True).encode()))
    return files


def nemo_settings(
    config: ModelConfig,
    *,
    tokenizer: str,
    dtype: torch.dtype,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> dict[str, Any]:
    """``model_config.yaml``: the keys that NeMo needs to build the model."""
    if config.norm != "layernorm1p" or config.mlp != "relu2" or config.attention_bias:
        raise CheckpointError(
            f"norm {config.norm}, mlp {config.mlp}, attention bias {config.attention_bias}: "
            "only the Nemotron-4 family has a NeMo form here"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind != "linear":
        raise CheckpointError(f"rope scaling {scaling.kind!r} has no NeMo setting")
    return {
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        "mcore_gpt": True,
        "transformer_engine": True,
        "megatron_amp_O2": True,
        "precision": PRECISION[dtype],
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "encoder_seq_length": config.context_length,
        "max_position_embeddings": config.context_length,
        "position_embedding_type": "rope",
        "rotary_percentage": config.rotary_fraction,
        "rotary_base": config.rope_theta,
        "seq_len_interpolation_factor": None if scaling is None else scaling.factor,
        "normalization": "layernorm1p",
        "layernorm_epsilon": config.norm_eps,
        "activation": "squared-relu",
        "bias": False,
        "share_embeddings_and_output_weights": config.tie_embeddings,
        "init_method_std": config.init_std,
        "make_vocab_size_divisible_by": 1,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "dist_ckpt_format": "zarr",
        "tokenizer": {
            "library": "sentencepiece",
            "type": None,
            "model": f"nemo:{tokenizer}",
            "sentencepiece_legacy": False,
        },
    }


def _check_split(config: ModelConfig, tensor_parallel: int, pipeline_parallel: int) -> None:
    for what, size, by in (
        ("num_kv_heads", config.num_kv_heads, tensor_parallel),
        ("ffn_hidden_size", config.ffn_hidden_size, tensor_parallel),
        ("vocab_size", config.vocab_size, tensor_parallel),
        ("num_layers", config.num_layers, pipeline_parallel),
    ):
        if by < 1 or size % by:
            raise CheckpointError(
                f"{what} ({size}) is not divisible by the parallel size {by}",
                hint=f"use one of {', '.join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)}",
            )


def _tensor_files(
    checkpoint: Checkpoint,
    key: str,
    entries: list[tuple[RowPart, ...]],
    is_stacked: bool,
    dtype: torch.dtype,
    tensor_parallel: int,
) -> Iterator[OutputFile]:
    rows = sum(part.stop - part.start for part in entries[0])
    shape = (rows, *checkpoint.tensors[entries[0][0].name].shape[1:])
    split = SPLIT_DIM.get(key)
    chunk = tuple(n // tensor_parallel if dim == split else n for dim, n in enumerate(shape))
    folder = f"model_weights/model.{key}"
    layers = (len(entries),) if is_stacked else ()
    for layer, parts in enumerate(entries):
        for rank in range(tensor_parallel if split is not None else 1):
            position = [rank if dim == split else 0 for dim in range(len(shape))]
            name = ".".join(map(str, ([layer] if is_stacked else []) + position))
            size = dtype.itemsize * chunk[0] * (chunk[1] if len(chunk) == 2 else 1)
            first = rank * chunk[0] if split == 0 else 0
            columns = slice(rank * chunk[1], (rank + 1) * chunk[1]) if split == 1 else slice(None)
            yield OutputFile(
                f"{folder}/{name}", size, _Chunk(checkpoint, parts, first, first + chunk[0], columns, dtype)
            )
    array = {
        "chunks": [*([1] if is_stacked else []), *chunk],
        "compressor": None,
        "dtype": ZARR_DTYPES[dtype],
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": [*layers, *shape],
        "zarr_format": 2,
    }
    yield small_file(f"{folder}/.zarray", json.dumps(array, indent=4).encode())


class _Chunk:
    """The blocks of one chunk file: rows ``first:last`` and some columns of a NeMo tensor."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: tuple[RowPart, ...],
        first: int,
        last: int,
        columns: slice,
        dtype: torch.dtype,
    ) -> None:
        self._checkpoint, self._parts, self._columns, self._dtype = checkpoint, parts, columns, dtype
        self._first, self._last = first, last

    def __call__(self) -> Blocks:
        position = 0
        for part in self._parts:
            low = max(self._first, position)
            high = min(self._last, position + part.stop - part.start)
            offset = part.start - position
            position += part.stop - part.start
            if low >= high:
                continue
            shape = self._checkpoint.tensors[part.name].shape
            for start, stop in row_ranges(low + offset, high + offset, shape[1:]):
                rows = self._checkpoint.read_rows(part.name, start, stop, self._dtype)
                if rows.dim() == 2:
                    rows = rows[:, self._columns]
                yield as_bytes(rows.contiguous())
        return None
