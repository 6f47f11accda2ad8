"""Shapes of the models that people plan for, from their published configurations."""

from __future__ import annotations

from nemotron4.cluster.sizes import KnownShape


def _shape(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    **more: int | bool,
) -> KnownShape:
    return KnownShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads,
        vocab_size=vocab,
        context_length=context,
        **more,  # type: ignore[arg-type]  # each name has one type
    )


def _llama3(layers: int, hidden: int, ffn: int, heads: int, **more: int | bool) -> KnownShape:
    return _shape(layers, hidden, ffn, heads, 8, 128256, 131072, **more)


def _qwen25(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, **more: int | bool
) -> KnownShape:
    return _shape(layers, hidden, ffn, heads, kv_heads, vocab, 32768, has_qkv_bias=True, **more)


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, **more: int | bool) -> KnownShape:
    return _shape(layers, hidden, ffn, heads, 8, 151936, 40960, has_qk_norm=True, **more)


KNOWN_MODELS = {
    "llama-2-7b": _shape(32, 4096, 11008, 32, 32, 32000, 4096),
    "llama-2-13b": _shape(40, 5120, 13824, 40, 40, 32000, 4096),
    "llama-2-70b": _shape(80, 8192, 28672, 64, 8, 32000, 4096),
    "llama-3.1-8b": _llama3(32, 4096, 14336, 32),
    "llama-3.1-70b": _llama3(80, 8192, 28672, 64),
    "llama-3.1-405b": _llama3(126, 16384, 53248, 128),
    "llama-3.2-1b": _llama3(16, 2048, 8192, 32, head_dim=64, tie_embeddings=True),
    "llama-3.2-3b": _llama3(28, 3072, 8192, 24, tie_embeddings=True),
    "llama-3.3-70b": _llama3(80, 8192, 28672, 64),
    "mistral-7b": _shape(32, 4096, 14336, 32, 8, 32768, 32768),
    "mistral-nemo-12b": _shape(40, 5120, 14336, 32, 8, 131072, 131072),
    "mistral-small-24b": _shape(40, 5120, 32768, 32, 8, 131072, 32768),
    "mistral-large-123b": _shape(88, 12288, 28672, 96, 8, 32768, 131072),
    "qwen2.5-0.5b": _qwen25(24, 896, 4864, 14, 2, 151936, head_dim=64, tie_embeddings=True),
    "qwen2.5-1.5b": _qwen25(28, 1536, 8960, 12, 2, 151936, tie_embeddings=True),
    "qwen2.5-3b": _qwen25(36, 2048, 11008, 16, 2, 151936, tie_embeddings=True),
    "qwen2.5-7b": _qwen25(28, 3584, 18944, 28, 4, 152064),
    "qwen2.5-14b": _qwen25(48, 5120, 13824, 40, 8, 152064),
    "qwen2.5-32b": _qwen25(64, 5120, 27648, 40, 8, 152064),
    "qwen2.5-72b": _qwen25(80, 8192, 29568, 64, 8, 152064),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tie_embeddings=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tie_embeddings=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tie_embeddings=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64),
}
