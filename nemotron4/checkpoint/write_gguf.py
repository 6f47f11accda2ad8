"""A checkpoint as GGUF for llama.cpp: a Nemotron model with a SentencePiece vocabulary, or another GGUF file.

GGUF keeps norm weights of Nemotron models as gamma (the 1 is added here), in float32. From a GGUF file all
metadata is copied, so any architecture that is read can be quantised anew.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import sentencepiece
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nemotron4.checkpoint.cache import part_name
from nemotron4.checkpoint.convert_files import Blocks, OutputFile
from nemotron4.checkpoint.gguf import ROPE_FACTORS, GgufCheckpoint, to_interleaved
from nemotron4.checkpoint.gguf_quantize import kind_for, quantize_blocks
from nemotron4.checkpoint.interface import BLOCK_VALUES, Checkpoint, blocks
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint
from nemotron4.checkpoint.nemo_files import as_bytes
from nemotron4.checkpoint.write_quantized import ErrorSum
from nemotron4.errors import CheckpointError
from nemotron4.model.config import ModelConfig, yarn_attention
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
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
GgufScheme = Literal["q8_0", "q4_0", "q4_k_m", "q6_k"]
SCHEMES: dict[GgufScheme, GGMLQuantizationType] = {
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_k_m": GGMLQuantizationType.Q4_K,
    "q6_k": GGMLQuantizationType.Q6_K,
}
SCHEME_FILES: dict[GgufScheme, Any] = {
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
}
ALIGNMENT = 32
SPLIT_BYTES = 40 * 1000**3


def gguf_files(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    sentencepiece_model: bytes | None,
    quantize: GgufScheme | None = None,
    split_bytes: int = SPLIT_BYTES,
) -> list[OutputFile]:
    """One file, or the numbered parts of about ``split_bytes`` that llama.cpp joins."""
    source = _gguf_source(checkpoint)
    config = checkpoint.config
    is_nemotron = config.norm == "layernorm1p" and not config.num_reward_attributes
    if source is None and not (is_nemotron and sentencepiece_model is not None):
        raise CheckpointError(
            f"{checkpoint.path}: GGUF files are written for Nemotron-4 language models with a SentencePiece "
            f"tokenizer, and from other GGUF files; this one has norm {config.norm}, "
            f"{config.num_reward_attributes} reward attributes, "
            f"{'no' if sentencepiece_model is None else 'a'} SentencePiece model"
        )
    if is_nemotron and config.num_heads * config.head_dim != config.hidden_size:
        raise CheckpointError(
            f"{checkpoint.path}: {config.num_heads} heads of {config.head_dim} are not the hidden size "
            f"{config.hidden_size}; llama.cpp loads no such Nemotron model",
            hint="write --to hf instead",
        )
    settings = _Settings(checkpoint, dtype, quantize, sentencepiece_model)
    parts: list[list[str]] = [[]]
    filled = 0
    for name in settings.names():
        size = settings.stored_bytes(name)
        if parts[-1] and filled + size > split_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size
    return [_file(settings, part, number, parts) for number, part in enumerate(parts)]


def _gguf_source(checkpoint: Checkpoint) -> GgufCheckpoint | None:
    """The GGUF file that is read, also through an adapter."""
    base = checkpoint.base if isinstance(checkpoint, MergedCheckpoint) else checkpoint
    return base if isinstance(base, GgufCheckpoint) else None


@dataclass(frozen=True)
class _Settings:
    """What is written, and as what type."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    quantize: GgufScheme | None
    model: bytes | None  # of SentencePiece; None where the source is a GGUF file

    def names(self) -> list[str]:
        config = self.checkpoint.config
        return [
            name
            for name in self.checkpoint.tensors
            if not (name == "lm_head.weight" and config.tie_embeddings) and not name.endswith("inv_freq")
        ]

    def kind(self, name: str) -> GGMLQuantizationType:
        shape = self.checkpoint.tensors[name].shape
        if len(shape) == 1:
            return GGMLQuantizationType.F32
        if self.quantize is None:
            return TYPES[self.dtype]
        return kind_for(_mixed(self.quantize, name, self.checkpoint.config), shape[1])

    def stored_bytes(self, name: str) -> int:
        size = self.num_bytes(name)
        return size + -size % ALIGNMENT

    def num_bytes(self, name: str) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind(name)]
        return math.prod(self.checkpoint.tensors[name].shape) // block * block_bytes


def _mixed(scheme: GgufScheme, name: str, config: ModelConfig) -> GGMLQuantizationType:
    """llama.cpp's choice for each tensor: more bits for the output, in Q4_K_M for some v and down layers."""
    kind = SCHEMES[scheme]
    is_output = name == ("model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight")
    if is_output:
        return kind if kind is GGMLQuantizationType.Q8_0 else GGMLQuantizationType.Q6_K
    if scheme == "q4_k_m" and name.endswith(("v_proj.weight", "down_proj.weight")):
        layer, eighth = int(name.split(".")[2]), config.num_layers // 8
        if layer < eighth or layer >= 7 * config.num_layers // 8 or (layer - eighth) % 3 == 2:
            return GGMLQuantizationType.Q6_K
    return kind


def gguf_name(name: str) -> str:
    """GGUF's name of a Hugging Face tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[rest]}.{kind}"


def _file(
    settings: _Settings, names: Sequence[str], number: int, parts: Sequence[Sequence[str]]
) -> OutputFile:
    header = _header(settings, names, number, parts)
    config = settings.checkpoint.config
    factors = config.rope_scaling.factors if number == 0 and config.rope_scaling else ()

    def written() -> Blocks:
        facts: dict[str, Any] = {}
        yield header
        if factors:
            yield _padded(np.array(factors, np.float32).tobytes())
        for name in names:
            error, size = ErrorSum(), 0
            for rows in _rows(settings.checkpoint, name):
                data = _stored(rows, name, settings, error)
                size += len(data)
                yield data
            if padding := -size % ALIGNMENT:
                yield bytes(padding)
            if settings.kind(name) not in TYPES.values():
                facts[name] = error.to_json()
        return facts

    file = "model.gguf" if len(parts) == 1 else part_name("model", number + 1, len(parts))
    size = len(header) + len(_padded(bytes(4 * len(factors)))) + sum(map(settings.stored_bytes, names))
    return OutputFile(file, size, written)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


def _rows(checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    """The rows in GGUF's order and convention: gamma, and interleaved heads in q and k of Llama models."""
    config, shape = checkpoint.config, checkpoint.tensors[name].shape
    if config.norm == "rmsnorm" and name.split(".")[-2] in ("q_proj", "k_proj"):
        step = max(1, BLOCK_VALUES // (math.prod(shape[1:]) * config.head_dim)) * config.head_dim
        for start in range(0, shape[0], step):
            rows = checkpoint.read_rows(name, start, min(start + step, shape[0]))
            yield to_interleaved(rows, config.head_dim)
    elif config.norm == "layernorm1p" and name.endswith("norm.weight"):
        for rows in blocks(checkpoint, name, torch.float32):
            yield rows + 1
    else:
        yield from blocks(checkpoint, name)


def _stored(rows: torch.Tensor, name: str, settings: _Settings, error: ErrorSum) -> memoryview:
    kind = settings.kind(name)
    plain = next((dtype for dtype, known in TYPES.items() if known is kind), None)
    if plain is not None:
        return as_bytes(rows.to(plain).contiguous())
    data, restored_RC = quantize_blocks(rows, kind)
    error.add(rows, restored_RC)
    return memoryview(np.ascontiguousarray(data).reshape(-1).data)


def _header(settings: _Settings, names: Sequence[str], number: int, parts: Sequence[Sequence[str]]) -> bytes:
    """Everything before the first weight, padded to the alignment; made by the ``gguf`` package."""
    checkpoint = settings.checkpoint
    source = _gguf_source(checkpoint)
    family = ARCHITECTURE if source is None else source.metadata["general.architecture"]
    writer = gguf.GGUFWriter(None, family)
    if number == 0:
        if source is not None:
            _copy_metadata(writer, _in_format(source, checkpoint))
        else:
            assert settings.model is not None
            _add_settings(writer, checkpoint)
            _add_vocabulary(writer, checkpoint, settings.model)
        if settings.quantize is None:
            writer.add_file_type(FILE_TYPES[settings.dtype])
        else:
            writer.add_file_type(SCHEME_FILES[settings.quantize])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if len(parts) > 1:
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_NO, number)
        writer.add_uint16(gguf.Keys.Split.LLM_KV_SPLIT_COUNT, len(parts))
        writer.add_int32(gguf.Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, sum(map(len, parts)))
    scaling = checkpoint.config.rope_scaling
    if number == 0 and scaling is not None and scaling.factors:
        count = len(scaling.factors)
        kind = GGMLQuantizationType.F32
        writer.add_tensor_info(ROPE_FACTORS, (count,), np.dtype(np.float32), 4 * count, raw_dtype=kind)
    for name in names:
        shape, kind = checkpoint.tensors[name].shape, settings.kind(name)
        size = settings.num_bytes(name)
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), size, raw_dtype=kind)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "header.gguf")
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % ALIGNMENT)


def _in_format(source: GgufCheckpoint, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What the file says, with the prompt format of the adapter that is merged."""
    found = checkpoint.prompt_format()
    if found is None or found == source.own_format():
        return source.metadata
    other = "tokenizer.chat_template"
    kept = {key: value for key, value in source.metadata.items() if not key.startswith(f"{other}.")}
    return {**kept, other: found.template}


def _copy_metadata(writer: Any, metadata: Mapping[str, Any]) -> None:
    """Everything about the model and its vocabulary; what describes the files is made anew."""
    made = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
    for key, value in metadata.items():
        if key in made or key.startswith(("split.", "GGUF.")):
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_uint32 if 0 <= value < 2**32 else writer.add_int64)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:
            writer.add_array(key, value)


def _add_settings(writer: Any, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    writer.add_name(checkpoint.name)
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
