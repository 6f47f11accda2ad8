"""A checkpoint as GGUF for llama.cpp: architecture ``nemotron``, vocabulary from SentencePiece.

GGUF keeps norm weights as gamma (the 1 is added here) in float32; matrices keep their rows and columns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch

from nemotron4.checkpoint.cache import part_name
from nemotron4.checkpoint.convert_files import Blocks, OutputFile
from nemotron4.checkpoint.interface import Checkpoint, blocks
from nemotron4.checkpoint.nemo_files import as_bytes
from nemotron4.errors import CheckpointError
from nemotron4.model.config import yarn_attention
from nemotron4.text.sentencepiece_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    user_defined_ids,
)

ARCHITECTURE = "nemotron"
TYPES = {
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.float32: gguf.GGMLQuantizationType.F32,
}
FILE_TYPES = {
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.float32: gguf.LlamaFileType.ALL_F32,
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
ALIGNMENT = 32
SPLIT_BYTES = 40 * 1000**3


def gguf_files(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    sentencepiece_model: bytes | None,
    split_bytes: int = SPLIT_BYTES,
) -> list[OutputFile]:
    """One file, or the numbered parts of about ``split_bytes`` that llama.cpp joins."""
    config = checkpoint.config
    if config.norm != "layernorm1p" or config.num_reward_attributes or sentencepiece_model is None:
        raise CheckpointError(
            f"{checkpoint.path}: GGUF files are written for Nemotron-4 language models with a SentencePiece "
            f"tokenizer; this one has norm {config.norm}, {config.num_reward_attributes} reward attributes, "
            f"{'no' if sentencepiece_model is None else 'a'} SentencePiece model"
        )
    if config.num_heads * config.head_dim != config.hidden_size:
        raise CheckpointError(
            f"{checkpoint.path}: {config.num_heads} heads of {config.head_dim} are not the hidden size "
            f"{config.hidden_size}; llama.cpp loads no such Nemotron model",
            hint="write --to hf instead",
        )
    names = [
        name
        for name in checkpoint.tensors
        if not (name == "lm_head.weight" and config.tie_embeddings) and not name.endswith("inv_freq")
    ]
    parts: list[list[str]] = [[]]
    filled = 0
    for name in names:
        size = _stored_bytes(checkpoint, name, dtype)
        if parts[-1] and filled + size > split_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return [
        _file(checkpoint, part, number, parts, dtype, sentencepiece_model)
        for number, part in enumerate(parts)
    ]


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}"


def _stored_dtype(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if len(checkpoint.tensors[name].shape) == 1 else dtype


def _stored_bytes(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> int:
    values = int(np.prod(checkpoint.tensors[name].shape, dtype=np.int64))
    size = values * _stored_dtype(checkpoint, name, dtype).itemsize
    return size + -size % ALIGNMENT


def _file(
    checkpoint: Checkpoint,
    names: Sequence[str],
    number: int,
    parts: Sequence[Sequence[str]],
    dtype: torch.dtype,
    model: bytes,
) -> OutputFile:
    header = _header(checkpoint, names, number, parts, dtype, model)

    def written() -> Blocks:
        yield header
        for name in names:
            stored = _stored_dtype(checkpoint, name, dtype)
            is_norm = name.endswith("norm.weight")
            size = 0
            for rows in blocks(checkpoint, name, torch.float32 if is_norm else stored):
                data = as_bytes((rows + 1 if is_norm else rows).contiguous())
                size += len(data)
                yield data
            if padding := -size % ALIGNMENT:
                yield bytes(padding)
        return None

    file = "model.gguf" if len(parts) == 1 else part_name("model", number + 1, len(parts))
    size = len(header) + sum(_stored_bytes(checkpoint, name, dtype) for name in names)
    return OutputFile(file, size, written)


def _header(
    checkpoint: Checkpoint,
    names: Sequence[str],
    number: int,
    parts: Sequence[Sequence[str]],
    dtype: torch.dtype,
    model: bytes,
) -> bytes:
    """Everything before the first weight, padded to the alignment; made by the ``gguf`` package."""
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    if number == 0:
        _add_settings(writer, checkpoint, dtype)
        _add_vocabulary(writer, checkpoint, model)
    if len(parts) > 1:
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, number)
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, len(parts))
        writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, sum(map(len, parts)))
    for name in names:
        stored = _stored_dtype(checkpoint, name, dtype)
        shape = checkpoint.tensors[name].shape
        size = int(np.prod(shape, dtype=np.int64)) * stored.itemsize
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), size, raw_dtype=TYPES[stored])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "header.gguf")
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % ALIGNMENT)


def _add_settings(writer: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    config = checkpoint.config
    writer.add_name(checkpoint.name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_vocab_size(config.vocab_size)
    scaling = config.rope_scaling
    if scaling is None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    elif scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling.kind == "yarn" and scaling.truncate:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context_length)
        writer.add_rope_scaling_attn_factors(scaling.attention_factor / yarn_attention(scaling.factor))
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
    else:
        raise CheckpointError(f"{checkpoint.path}: rope scaling {scaling.kind!r} has no GGUF setting here")


def _add_vocabulary(writer: Any, checkpoint: Checkpoint, model: bytes) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = processor.vocab_size()
    if size != checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {size} pieces, "
            f"the model {checkpoint.config.vocab_size} rows"
        )
    user_defined = set(user_defined_ids(model))

    def kind(i: int) -> int:
        if i in user_defined:
            return USER_DEFINED
        checks = (
            (processor.is_byte(i), BYTE),
            (processor.is_control(i), CONTROL),
            (processor.is_unknown(i), UNKNOWN),
            (processor.is_unused(i), UNUSED),
        )
        return next((value for holds, value in checks if holds), NORMAL)

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([processor.id_to_piece(i) for i in range(size)])
    writer.add_token_scores([processor.get_score(i) for i in range(size)])
    writer.add_token_types([kind(i) for i in range(size)])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    ends = checkpoint.eos_token_ids
    given = {
        writer.add_bos_token_id: processor.bos_id(),
        writer.add_eos_token_id: processor.eos_id(),
        writer.add_unk_token_id: processor.unk_id(),
        writer.add_pad_token_id: processor.pad_id(),
        writer.add_eot_token_id: next((i for i in ends if i != processor.eos_id()), -1),
    }
    for add, token_id in given.items():
        if token_id >= 0:
            add(token_id)
    prompt = checkpoint.prompt_format()
    if prompt is not None:
        writer.add_chat_template(prompt.template)
