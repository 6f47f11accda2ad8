"""The names and shapes of a decoder's weights, without building it and without torch."""

from __future__ import annotations

from nemotron4.model.config import ModelConfig


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of a language model in the order of ``Transformer.state_dict()``."""
    hidden, query, kv = (
        config.hidden_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (hidden,)
        if config.norm == "layernorm1p":
            shapes[f"{name}.bias"] = (hidden,)

    def linear(name: str, rows: int, columns: int, *, has_bias: bool = False) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        if has_bias:
            shapes[f"{name}.bias"] = (rows,)

    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        norm(f"{prefix}.input_layernorm")
        for name, rows in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
            linear(f"{prefix}.self_attn.{name}", rows, hidden, has_bias=config.attention_bias)
        has_bias = config.attention_bias
        linear(f"{prefix}.self_attn.o_proj", hidden, query, has_bias=has_bias)
        norm(f"{prefix}.post_attention_layernorm")
        for name in ("gate_proj", "up_proj") if config.mlp == "swiglu" else ("up_proj",):
            linear(f"{prefix}.mlp.{name}", config.ffn_hidden_size, hidden)
        linear(f"{prefix}.mlp.down_proj", hidden, config.ffn_hidden_size)
    norm("model.norm")
    shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes
