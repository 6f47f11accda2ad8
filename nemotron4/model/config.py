"""The shape of a decoder of the Nemotron-4 or Llama family, and of its weights. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nemotron4.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies of RoPE are changed, as transformers has it.

    "linear": a plain division. "llama3": only long wavelengths are divided. "yarn": the same by a ramp, and
    queries and keys grow by ``attention_factor`` (Peng et al. 2023). "dynamic": no change within the context
    length. "factors": each pair's frequency is divided by a factor of its own, as GGUF files store llama3's.
    """

    kind: Literal["linear", "llama3", "yarn", "dynamic", "factors"]
    factor: float = 1.0
    factors: tuple[float, ...] = ()
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192
    attention_factor: float = 1.0  # of the rotated dims of queries and of keys
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: the ramp begins and ends at whole pairs


def yarn_attention(factor: float, scale: float = 1.0) -> float:
    """YaRN's ``attention_factor`` where a file has none (Peng et al. 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every number that decides what a decoder computes.

    The family follows from three settings: ``norm`` ("layernorm1p" with bias and stored gamma - 1, or
    "rmsnorm"), ``mlp`` ("relu2", un-gated squared ReLU, or "swiglu") and ``tie_embeddings``.
    ``head_dim`` is independent of ``hidden_size / num_heads`` (Minitron-8B: 128 against 85.3).
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int = 4096
    norm: Literal["layernorm1p", "rmsnorm"] = "layernorm1p"
    norm_eps: float = 1e-5
    mlp: Literal["relu2", "swiglu"] = "relu2"
    rotary_fraction: float = 0.5  # share of each head's dims that RoPE rotates
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False  # q, k and v (and o in the Llama family)
    init_std: float = 0.0134
    num_reward_attributes: int = 0  # rows of the reward head; 0 for a language model

    def __post_init__(self) -> None:
        positive = (
            "num_layers hidden_size ffn_hidden_size num_heads num_kv_heads head_dim vocab_size context_length"
        )
        for name in positive.split():
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} is {value}; expected 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads ({self.num_heads}) is not divisible by num_kv_heads ({self.num_kv_heads})"
            )
        if not 0 < self.rotary_fraction <= 1:
            raise ConfigError(f"rotary_fraction is {self.rotary_fraction}; expected in (0, 1]")
        if self.rotary_dim % 2:
            raise ConfigError(f"rotary_dim ({self.rotary_dim} of {self.head_dim}) is odd; RoPE rotates pairs")
        scaling = self.rope_scaling
        if scaling and scaling.kind == "factors" and len(scaling.factors) != self.rotary_dim // 2:
            raise ConfigError(
                f"{len(scaling.factors)} RoPE factors; expected one for each of {self.rotary_dim // 2} pairs"
            )

    @property
    def rotary_dim(self) -> int:
        """Leading dims of each head that are rotated."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def num_queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Of the decoder with its output layer, or with the head of a reward model."""
        shapes = weight_shapes(self)
        if self.tie_embeddings or self.num_reward_attributes:
            del shapes["lm_head.weight"]
        return sum(map(math.prod, shapes.values())) + self.num_reward_attributes * (self.hidden_size + 1)

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Keys and values of one position in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_element


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
