"""A random model's directory as a GGUF file for llama.cpp. usage: to_gguf.py FOLDER FILE [Q8_0|Q4_0]"""

import sys

import gguf
import torch
from gguf.constants import GGMLQuantizationType as Kind

from nemotron4.checkpoint import open_checkpoint

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip

folder, target = sys.argv[1:3]
kind = Kind[sys.argv[3]] if len(sys.argv) > 3 else Kind.F32
checkpoint = open_checkpoint(folder)
config = checkpoint.config
writer = gguf.GGUFWriter(target, "nemotron")
writer.add_vocab_size(config.vocab_size)
writer.add_context_length(config.context_length)
writer.add_embedding_length(config.hidden_size)
writer.add_block_count(config.num_layers)
writer.add_feed_forward_length(config.ffn_hidden_size)
writer.add_head_count(config.num_heads)
writer.add_head_count_kv(config.num_kv_heads)
writer.add_key_length(config.head_dim)
writer.add_value_length(config.head_dim)
writer.add_layer_norm_eps(config.norm_eps)
writer.add_rope_dimension_count(config.rotary_dim)
writer.add_rope_freq_base(config.rope_theta)
pieces = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
pieces += [f"\u2581tok{i}".encode() for i in range(config.vocab_size - len(pieces))]
writer.add_tokenizer_model("llama")
writer.add_token_list(pieces)
writer.add_token_scores([-float(i) for i in range(len(pieces))])
writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)])
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)
for name in checkpoint.tensors:
    values = checkpoint.read(name, torch.float32).numpy()
    if name.endswith("norm.weight"):
        values = values + 1  # LayerNorm1P
    stem, _, suffix = name.rpartition(".")
    if stem in NAMES:
        stored = NAMES[stem]
    else:
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        stored = f"blk.{layer}.{NAMES[part]}"
    as_kind = kind if values.ndim == 2 else Kind.F32
    writer.add_tensor(f"{stored}.{suffix}", gguf.quants.quantize(values, as_kind), raw_dtype=as_kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
