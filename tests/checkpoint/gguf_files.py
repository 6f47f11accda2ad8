"""GGUF files made from Hugging Face directories with the ``gguf`` package, in llama.cpp's conventions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import quantize
from safetensors.numpy import load_file

from tests.tiny_models import CHATML

_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """model.layers.1.mlp.up_proj.weight -> blk.1.ffn_up.weight"""
    module, _, kind = name.rpartition(".")
    if module in _WHOLE:
        return f"{_WHOLE[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_PARTS[part]}.{kind}"


def _interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp stores them for Llama: (half, i) becomes (i, half) within each head."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(source: Path, file: Path, kind: Kind = Kind.F32, **metadata: Any) -> Path:
    """Convert a Hugging Face directory; matrices are stored as ``kind``, vectors as F32.

    ``metadata`` adds or replaces keys, ``__`` standing for a dot; None leaves one out.
    """
    config = json.loads((source / "config.json").read_text())
    family = config["model_type"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(file, family)
    rotary = int(config["head_dim"] * config["rope_parameters"].get("partial_rotary_factor", 1.0))
    values: dict[str, Any] = {
        f"{family}.context_length": config["max_position_embeddings"],
        f"{family}.embedding_length": config["hidden_size"],
        f"{family}.block_count": config["num_hidden_layers"],
        f"{family}.feed_forward_length": config["intermediate_size"],
        f"{family}.attention.head_count": config["num_attention_heads"],
        f"{family}.attention.head_count_kv": config["num_key_value_heads"],
        f"{family}.attention.key_length": config["head_dim"],
        f"{family}.attention.value_length": config["head_dim"],
        f"{family}.rope.dimension_count": rotary,
        f"{family}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
    }
    if family == "nemotron":
        values["nemotron.attention.layer_norm_epsilon"] = config["norm_eps"]
    else:
        values["llama.attention.layer_norm_rms_epsilon"] = config["rms_norm_eps"]
        values["tokenizer.chat_template"] = CHATML
    values |= {key.replace("__", "."): value for key, value in metadata.items() if "ggml__pre" not in key}
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_string(key, value)
    _add_vocabulary(writer, source, config["vocab_size"], metadata.get("tokenizer__ggml__pre", "gpt-2"))
    for name, tensor in load_file(source / "model.safetensors").items():
        tensor = tensor.astype(np.float32)
        part = name.split(".")[-2]
        if family == "nemotron" and name.endswith("norm.weight"):
            tensor = tensor + 1
        if family == "llama" and part in heads:
            tensor = _interleaved(tensor, heads[part])
        stored = Kind.F32 if tensor.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), quantize(tensor, stored), raw_dtype=stored)
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(config["head_dim"], config["rope_parameters"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _llama3_factors(head_dim: int, rope: dict[str, Any]) -> np.ndarray:
    """What llama.cpp's converter stores: 1 for short waves, the factor for long ones, a blend between."""
    factors = []
    for i in range(0, head_dim, 2):
        turns = rope["original_max_position_embeddings"] * rope["rope_theta"] ** (-i / head_dim) / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = np.clip((turns - low) / (high - low), 0, 1)
        factors.append(1 / ((1 - share) / rope["factor"] + share))
    return np.array(factors, np.float32)


def _add_vocabulary(writer: gguf.GGUFWriter, source: Path, vocab_size: int, pre: str) -> None:
    """Padded with unused entries (type 5) to the rows of the embedding, as llama.cpp's converter does."""
    if (source / "tokenizer.model").is_file():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        ids = range(pieces.vocab_size())
        kinds = [
            3 if pieces.is_control(i) else 2 if pieces.is_unknown(i) else 6 if pieces.is_byte(i) else 1
            for i in ids
        ]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([pieces.id_to_piece(i) for i in ids])
        writer.add_token_scores([pieces.get_score(i) for i in ids])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(3)
        writer.add_unk_token_id(1)
        return
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    padding = [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    writer.add_token_list(tokens + padding)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens] + [5] * len(padding))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
