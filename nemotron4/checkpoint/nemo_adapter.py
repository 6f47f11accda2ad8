"""LoRA adapters that NeMo 1.x saved (a ``.nemo`` file or its directory), under Hugging Face names.

``model_config.yaml`` has rank and alpha in ``peft.lora_tuning``. The factors stand in ``model_weights.ckpt``,
in one such file for each tensor and pipeline rank, or in a distributed checkpoint. The target
``attention_qkv`` has one A for q, k and v, and a B whose rows are grouped like those of the fused QKV weight.
Names: NeMo ``adapters/parallel_adapters.py``; how ranks split: ``merge_lora_weights/merge.py``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nemotron4.checkpoint.nemo import read_nemo_index
from nemotron4.checkpoint.nemo_ckpt import read_ckpt
from nemotron4.checkpoint.nemo_config import NemoSettings, read_settings
from nemotron4.checkpoint.nemo_files import NemoFiles, open_nemo_files
from nemotron4.checkpoint.nemo_zarr import StoredTensor, read_rows_into
from nemotron4.errors import CheckpointError
from nemotron4.model.adapter_files import lora_from_nemo
from nemotron4.model.config import ModelConfig

_FUSED = "self_attention.adapter_layer.lora_kqv_adapter"
_MODULES = {
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter": "self_attn.q_proj",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.k_adapter": "self_attn.k_proj",
    "self_attention.adapter_layer.lora_unfused_kqv_adapter.v_adapter": "self_attn.v_proj",
    "self_attention.adapter_layer.lora_dense_attention_adapter": "self_attn.o_proj",
    "mlp.adapter_layer.lora_hto4h_adapter": "mlp.up_proj",
    "mlp.adapter_layer.lora_4htoh_adapter": "mlp.down_proj",
}
# Layers whose input is split over tensor ranks: there A is cut by columns, elsewhere by rows.
_ROW_PARALLEL = ("lora_dense_attention_adapter", "lora_4htoh_adapter")
_KEY = re.compile(r"(?:model\.|module\.|language_model\.)*(?:de|en)coder\.layers\.(?:(\d+)\.)?(.+)\.weight")
_RANK_FILE = re.compile(
    r"(?:(?:mp|tp)_rank_(?P<tensor>\d+)(?:_pp_rank_(?P<pipeline>\d+))?/)?model_weights\.ckpt"
)


@dataclass(frozen=True)
class NemoLora:
    """``factors``: weight name -> (A [rank, in], B [out, rank]); the update is ``scale`` B A."""

    scale: float
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def is_nemo_adapter(path: Path) -> bool:
    return path.suffix == ".nemo" or (path / "model_config.yaml").is_file()


def read_nemo_lora(path: Path, config: ModelConfig) -> NemoLora:
    """The whole adapter, which is small. CheckpointError for other kinds and for another model's."""
    files = open_nemo_files(path)
    settings = read_settings(files)
    peft = settings.section("peft")
    scheme, tuning = peft.get("peft_scheme"), peft.section("lora_tuning")
    if scheme != "lora":
        raise CheckpointError(
            f"{path}: peft_scheme is {scheme!r}; only 'lora' can be merged into the weights",
            hint="a whole model is opened as MODEL, not as an adapter" if scheme is None else None,
        )
    rank = tuning.integer("adapter_dim")
    alpha = tuning.number("alpha") if tuning.get("alpha") is not None else rank
    parts = _stored_parts(files, settings)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for (layer, module), pair in parts.items():
        if pair.keys() != {"linear_in", "linear_out"}:
            raise CheckpointError(f"{path}: layer {layer}, {module}: only {', '.join(pair)} is there")
        down_KC, up_RK = pair["linear_in"], pair["linear_out"]
        if down_KC.shape[0] != rank or up_RK.shape[1] != rank:
            raise CheckpointError(
                f"{path}: layer {layer}, {module}: factors {list(up_RK.shape)} and {list(down_KC.shape)}; "
                f"adapter_dim is {rank}"
            )
        prefix = f"model.layers.{layer}"
        if module == _FUSED:
            split = lora_from_nemo(
                down_KC,
                up_RK,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
            )
            factors |= {f"{prefix}.self_attn.{name}.weight": pair for name, pair in split.items()}
        elif module in _MODULES:
            factors[f"{prefix}.{_MODULES[module]}.weight"] = (down_KC, up_RK)
        else:
            raise CheckpointError(f"{path}: {module} is not a LoRA of a Nemotron layer")
    if not factors:
        raise CheckpointError(f"{path}: no LoRA factors are in it")
    return NemoLora(alpha / rank, factors)


_Parts = dict[tuple[int, str], dict[str, torch.Tensor]]


def _stored_parts(files: NemoFiles, settings: NemoSettings) -> _Parts:
    """(layer, NeMo's module name) -> its two factors, whole."""
    ranks = {
        (int(match["tensor"] or 0), int(match["pipeline"] or 0)): name
        for name in files.names
        if (match := _RANK_FILE.fullmatch(name))
    }
    if not ranks:
        return _from_distributed(files)
    num_tensor, num_stages = (max(axis) + 1 for axis in zip(*ranks, strict=True))
    if len(ranks) != num_tensor * num_stages:
        raise CheckpointError(
            f"{files.source}: {len(ranks)} rank files of {num_tensor} tensor x {num_stages} pipeline ranks"
        )
    layers_per_stage = settings.integer("num_layers", 0) // num_stages
    pieces: dict[tuple[int, str], dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
    for (_, stage), name in sorted(ranks.items()):
        for key, tensor in read_ckpt(files, name).items():
            layer, module, factor = _split_key(files, key)
            if layer is None:
                raise CheckpointError(f"{files.source}: {name}: {key} names no layer")
            pieces[layer + stage * layers_per_stage, module][factor].append(tensor)
    return {
        (layer, module): {
            factor: torch.cat(tensors, dim=int(factor == "linear_in" and module.endswith(_ROW_PARALLEL)))
            for factor, tensors in pair.items()
        }
        for (layer, module), pair in pieces.items()
    }


def _from_distributed(files: NemoFiles) -> _Parts:
    parts: _Parts = defaultdict(dict)
    for key, stored in read_nemo_index(files).items():
        layer, module, factor = _split_key(files, key)
        if layer is not None:
            parts[layer, module][factor] = _matrix(files, stored, ())
        else:  # stacked over the layers
            for number in range(stored.shape[0]):
                parts[number, module][factor] = _matrix(files, stored, (number,))
    return parts


def _matrix(files: NemoFiles, stored: StoredTensor, index: tuple[int, ...]) -> torch.Tensor:
    shape = stored.shape[len(index) :]
    if len(shape) != 2:
        raise CheckpointError(f"{files.source}: {stored.key} has shape {list(stored.shape)}")
    rows_RC = torch.empty(shape, dtype=stored.dtype)
    read_rows_into(files, stored, index, 0, rows_RC)
    return rows_RC


def _split_key(files: NemoFiles, key: str) -> tuple[int | None, str, str]:
    match = _KEY.fullmatch(key)
    module, _, factor = match[2].rpartition(".") if match else ("", "", "")
    if match is None or factor not in ("linear_in", "linear_out"):
        raise CheckpointError(f"{files.source}: tensor {key!r} is not a factor of a LoRA adapter")
    return None if match[1] is None else int(match[1]), module, factor
