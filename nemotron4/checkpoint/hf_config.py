"""``config.json`` of a Hugging Face directory, in every spelling in use, as a ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron4.checkpoint.quantized import check_settings
from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.model.config import ModelConfig, RopeScaling

# Model types whose decoder is exactly one of our two blocks.
_ACTIVATIONS = {"nemotron": "relu2", "llama": "silu", "mistral": "silu"}
_EPS = {"nemotron": "norm_eps", "llama": "rms_norm_eps", "mistral": "rms_norm_eps"}


def model_config(values: Mapping[str, Any], source: Path) -> ModelConfig:
    """The decoder that ``config.json`` describes; an error for whatever the decoder cannot compute.

    Shapes must be in the file: no default of a model class stands in for a missing one.
    """
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{source}: rope_parameters is {rope!r}; expected an object")
    # transformers 5.x moved these two into rope_parameters, which then counts.
    moved = {
        name: rope[name] for name in ("partial_rotary_factor", "rope_theta") if rope.get(name) is not None
    }
    reader = _Reader({**values, **moved}, source)
    kind = reader.get("model_type")
    if not isinstance(kind, str) or kind not in _ACTIVATIONS:
        raise CheckpointError(
            f"{source}: model_type is {kind!r}; readable: {', '.join(_ACTIVATIONS)}",
            hint="this decoder computes the Nemotron-4 and the Llama block, nothing else",
        )
    _refuse_unsupported(reader, kind, source)
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    head_dim = reader.integer("head_dim", "kv_channels", default=hidden_size // max(num_heads, 1))
    fraction_names = ("partial_rotary_factor", "rope_percent", "rope_percentage")
    try:
        return ModelConfig(
            num_layers=reader.integer("num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_hidden_size=reader.integer("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=reader.integer("num_key_value_heads", default=num_heads),
            head_dim=head_dim,
            vocab_size=reader.integer("vocab_size"),
            context_length=reader.integer("max_position_embeddings"),
            norm="layernorm1p" if kind == "nemotron" else "rmsnorm",
            norm_eps=reader.number(_EPS[kind], default=1e-5 if kind == "nemotron" else 1e-6),
            mlp="relu2" if kind == "nemotron" else "swiglu",
            rotary_fraction=reader.number(*fraction_names, default=0.5 if kind == "nemotron" else 1.0),
            rope_theta=reader.number("rope_theta", default=10000.0),
            rope_scaling=_rope_scaling(reader.get("rope_scaling") or rope, source),
            tie_embeddings=reader.flag("tie_word_embeddings"),
            attention_bias=reader.flag("attention_bias"),
            init_std=reader.number("initializer_range", default=0.02),
            num_reward_attributes=reader.integer("num_reward_attributes", default=0),
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error.message}", hint=error.hint) from error


class _Reader:
    """Typed look-ups under several spellings; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: Path) -> None:
        self._values, self._source = values, source

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def integer(self, *names: str, default: int | None = None) -> int:
        value = self._first(names, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self._source}: {names[0]} is {value!r}; expected an integer")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        value = self._first(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self._source}: {names[0]} is {value!r}; expected a number")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._source}: {name} is {value!r}; expected true or false")
        return value

    def _first(self, names: tuple[str, ...], default: float | None) -> Any:
        for name in names:
            if self._values.get(name) is not None:
                return self._values[name]
        if default is None:
            raise CheckpointError(f"{self._source}: {' or '.join(names)} is missing")
        return default

    def refuse(self, what: str, hint: str) -> CheckpointError:
        return CheckpointError(f"{self._source}: {what}", hint=hint)


def _refuse_unsupported(reader: _Reader, kind: str, source: Path) -> None:
    activation = reader.get("hidden_act", _ACTIVATIONS[kind])
    if activation != _ACTIVATIONS[kind]:
        raise reader.refuse(
            f"hidden_act is {activation!r}; a {kind} block here computes {_ACTIVATIONS[kind]!r}",
            "the weights would give other values under another activation",
        )
    if reader.flag("mlp_bias"):
        raise reader.refuse("mlp_bias is true", "the MLP here has no bias")
    quantization = reader.get("quantization_config")
    if quantization is not None:
        check_settings(quantization, source)
    window, context = reader.get("sliding_window"), reader.get("max_position_embeddings", 0)
    if kind == "mistral" and window is not None and window < context:
        raise reader.refuse(
            f"sliding_window is {window} and the context {context}; attention here is full",
            f"to use {window} tokens: set sliding_window to null and max_position_embeddings to {window}",
        )


def _rope_scaling(values: Any, source: Path) -> RopeScaling | None:
    """transformers 4.44 calls the kind ``type`` or ``rope_type``; 5.x has it in ``rope_parameters``."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{source}: rope_scaling is {values!r}; expected an object")
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(
            f"{source}: rope scaling of kind {kind!r}; readable: linear, llama3",
            hint="remove rope_scaling to use the model within its original context length",
        )
    names = ["factor"]
    if kind == "llama3":
        names += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [name for name in names if not isinstance(values.get(name), int | float)]
    if missing:
        raise CheckpointError(f"{source}: rope scaling {kind!r} has no number for {', '.join(missing)}")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(values["factor"]))
    return RopeScaling(
        kind="llama3",
        factor=float(values["factor"]),
        low_freq_factor=float(values["low_freq_factor"]),
        high_freq_factor=float(values["high_freq_factor"]),
        original_context_length=int(values["original_max_position_embeddings"]),
    )
