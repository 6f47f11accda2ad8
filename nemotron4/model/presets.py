"""Published shapes, from the technical reports and NVIDIA's own configurations."""

from __future__ import annotations

from collections.abc import Callable

from nemotron4.model.config import ModelConfig

# Sources: arXiv 2406.11704 table 1; arXiv 2402.16819 table 1; NeMo Nemotron4Config340B / 15B; the Hugging
# Face configurations of Minitron-4B and -8B (24 heads in the 4B: its card's 32 contradict its 4.19 B).


def nemotron4_340b() -> ModelConfig:
    return ModelConfig(
        num_layers=96,
        hidden_size=18432,
        ffn_hidden_size=73728,
        num_heads=96,
        num_kv_heads=8,
        head_dim=192,
        vocab_size=256000,
        init_std=0.0063,
    )


def nemotron4_15b() -> ModelConfig:
    return ModelConfig(
        num_layers=32,
        hidden_size=6144,
        ffn_hidden_size=24576,
        num_heads=48,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=256000,
    )


def minitron_8b() -> ModelConfig:
    return ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=16384,
        num_heads=48,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=256000,
    )


def minitron_4b() -> ModelConfig:
    return ModelConfig(
        num_layers=32,
        hidden_size=3072,
        ffn_hidden_size=9216,
        num_heads=24,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=256000,
    )


# The same block at about 3 M parameters, for training from scratch on a laptop.


def nano() -> ModelConfig:
    return ModelConfig(
        num_layers=6,
        hidden_size=192,
        ffn_hidden_size=768,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        vocab_size=2048,
        context_length=1024,
        init_std=0.02,
    )


# The demo model, whose weights `nemotron4 pull smollm2` fetches.


def smollm2_135m() -> ModelConfig:
    return ModelConfig(
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        context_length=8192,
        norm="rmsnorm",
        mlp="swiglu",
        rotary_fraction=1.0,
        rope_theta=100000.0,
        tie_embeddings=True,
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "nemotron4-340b": nemotron4_340b,
    "nemotron4-15b": nemotron4_15b,
    "minitron-8b": minitron_8b,
    "minitron-4b": minitron_4b,
    "nano": nano,
    "smollm2-135m": smollm2_135m,
}
