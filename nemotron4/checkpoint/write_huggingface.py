"""A checkpoint as a Hugging Face directory: sharded safetensors, configuration, tokenizer, chat template.

Shards are streams of rows: their headers are known before the first weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nemotron4.checkpoint.convert_files import Blocks, OutputFile, json_file, small_file
from nemotron4.checkpoint.convert_tokenizer import json_tokenizer_config, tokenizer_config, tokenizer_json
from nemotron4.checkpoint.interface import Checkpoint, blocks
from nemotron4.checkpoint.nemo_files import as_bytes
from nemotron4.checkpoint.write_quantized import (
    LayerInputs,
    Scheme,
    calibration_tokens,
    measure_inputs,
    quantization_config,
    quantized_group,
)
from nemotron4.checkpoint.write_safetensors import SHARD_BYTES, Entry, Group, safetensors_files
from nemotron4.errors import CheckpointError
from nemotron4.model.config import ModelConfig
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.tokenizer_files import TEMPLATE_FILE

# Copied from a Hugging Face source as they are.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", TEMPLATE_FILE, "vocab.json", "merges.txt",
)  # fmt: skip


def huggingface_files(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    sentencepiece_model: bytes | None,
    quantize: Scheme | None = None,
    calibration: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[OutputFile]:
    """Every file of the directory; ``config.json``, which makes it a checkpoint, comes last.

    ``calibration`` is a text file on which the layers' inputs are measured.
    """
    inputs: dict[str, LayerInputs] = {}
    if calibration is not None:
        inputs = measure_inputs(checkpoint, calibration_tokens(calibration, checkpoint))
    groups = [
        quantized_group(checkpoint, name, quantize, dtype, inputs)
        if quantize is not None and _is_linear(name)
        else _copied(checkpoint, name, dtype)
        for name in _names(checkpoint)
    ]
    files = safetensors_files(groups, shard_bytes=shard_bytes)
    files += _tokenizer_files(checkpoint, sentencepiece_model)
    config = checkpoint.config
    eos = list(checkpoint.eos_token_ids)
    generation: dict[str, Any] = {"eos_token_id": eos, "bos_token_id": checkpoint.bos_token_id}
    files.append(json_file("generation_config.json", generation))
    values = config_json(config, dtype=dtype)
    values |= {"bos_token_id": checkpoint.bos_token_id, "eos_token_id": eos[0] if eos else None}
    if quantize is not None:
        kept = [name.removesuffix(".weight") for name in ("lm_head.weight", "reward_head.weight")]
        values["quantization_config"] = quantization_config(quantize, checkpoint, ignored=kept)
    return [*files, json_file("config.json", values)]


def config_json(config: ModelConfig, *, dtype: torch.dtype) -> dict[str, Any]:
    """``config.json`` for NemotronForCausalLM or LlamaForCausalLM."""
    is_nemotron = config.norm == "layernorm1p"
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        given = config.rope_scaling
        if given.kind == "factors":
            raise CheckpointError(
                "RoPE scaling by the stored factors of a GGUF file has no setting in config.json",
                hint="convert from the model's Hugging Face checkpoint, which has the scaling's numbers",
            )
        scaling = {"rope_type": given.kind, "factor": given.factor}
        if given.kind in ("llama3", "yarn"):
            scaling["original_max_position_embeddings"] = given.original_context_length
        names: dict[str, tuple[str, ...]] = {
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("attention_factor", "beta_fast", "beta_slow", "truncate"),
        }
        scaling |= {name: getattr(given, name) for name in names.get(given.kind, ())}
    values: dict[str, Any] = {
        "architectures": ["NemotronForCausalLM" if is_nemotron else "LlamaForCausalLM"],
        "model_type": "nemotron" if is_nemotron else "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_act": "relu2" if is_nemotron else "silu",
        "norm_eps" if is_nemotron else "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "partial_rotary_factor": config.rotary_fraction,
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if config.num_reward_attributes:
        values["num_reward_attributes"] = config.num_reward_attributes
    return values


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    for name in checkpoint.tensors:
        is_copy = name == "lm_head.weight" and checkpoint.config.tie_embeddings
        if not is_copy and not name.endswith("rotary_emb.inv_freq"):
            yield name


def _is_linear(name: str) -> bool:
    """The weights that are quantised: every linear layer of the blocks, not the heads."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def _copied(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Group:
    def written() -> Blocks:
        for rows in blocks(checkpoint, name, dtype):
            yield as_bytes(rows.contiguous())
        return None

    return Group((Entry(name, dtype, checkpoint.tensors[name].shape),), written)


def _tokenizer_files(checkpoint: Checkpoint, model: bytes | None) -> list[OutputFile]:
    prompt = checkpoint.prompt_format()
    if checkpoint.format == "huggingface" and (
        (checkpoint.path / "tokenizer.json").is_file() or model is None
    ):
        own = {name: checkpoint.path / name for name in TOKENIZER_FILES}
        copied = {name: small_file(name, _read(path)) for name, path in own.items() if path.is_file()}
        if prompt is not None and prompt != getattr(checkpoint, "base", checkpoint).own_format():
            copied[TEMPLATE_FILE] = small_file(TEMPLATE_FILE, prompt.template.encode())  # an adapter's
        return list(copied.values())
    template = None if prompt is None else prompt.template
    if model is None:
        tokenizer = checkpoint.tokenizer()
        if not isinstance(tokenizer, JsonTokenizer):
            raise CheckpointError(
                f"{checkpoint.path}: its tokenizer has no Hugging Face form here",
                hint="convert from the NeMo or Hugging Face checkpoint instead",
            )
        values = json_tokenizer_config(tokenizer, chat_template=template, adds_bos=checkpoint.adds_bos)
        return [
            _compact("tokenizer.json", tokenizer.specification),
            json_file("tokenizer_config.json", values),
        ]
    files = [small_file("tokenizer.model", model)]
    specification = tokenizer_json(model)
    if specification is not None:
        files.append(_compact("tokenizer.json", specification))
    values = tokenizer_config(model, chat_template=template, adds_bos=checkpoint.adds_bos)
    return [*files, json_file("tokenizer_config.json", values)]


def _compact(name: str, value: Any) -> OutputFile:
    # With indentation, Python's slow encoder would write hundreds of thousands of lines.
    return small_file(name, json.dumps(value, ensure_ascii=False).encode())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
