"""``config.json`` of a Hugging Face directory, in every spelling in use, as a ModelConfig.

A key that changes what the model computes is honoured or refused; keys that change nothing are in
``IGNORED``; any other is named in a note. docs/checkpoints.md lists all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.model.config import ModelConfig, RopeScaling, yarn_attention


def _words(text: str) -> list[str]:
    return text.split()


# Model types whose decoder is exactly one of our two blocks, and the names of its activation.
ACTIVATIONS = {
    "nemotron": ("relu2", "squared_relu", "squared-relu"),
    "llama": ("silu", "swish"),
    "mistral": ("silu", "swish"),
}
_EPS = {"nemotron": "norm_eps", "llama": "rms_norm_eps", "mistral": "rms_norm_eps"}
READ = frozenset(
    _words("""
    model_type hidden_act hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim kv_channels vocab_size max_position_embeddings norm_eps rms_norm_eps
    partial_rotary_factor rope_percent rope_percentage rope_theta rope_scaling rope_parameters
    original_max_position_embeddings tie_word_embeddings attention_bias mlp_bias initializer_range
    num_reward_attributes quantization_config compression_config sliding_window bos_token_id eos_token_id
    torch_dtype dtype
""")
)
IGNORED = frozenset(
    _words("""
    architectures transformers_version use_cache _name_or_path attention_dropout hidden_dropout
    resid_pdrop embd_pdrop pretraining_tp pad_token_id unk_token_id sep_token_id torchscript return_dict
    output_attentions output_hidden_states use_return_dict use_bfloat16 _attn_implementation
    attn_implementation _flash_attn_2_enabled auto_map gradient_checkpointing unsloth_version
    unsloth_fixed is_llama_config cross_attention_hidden_size id2label label2id problem_type
    tokenizer_class prefix is_decoder is_encoder_decoder add_cross_attention chunk_size_feed_forward
    max_length min_length do_sample temperature top_k top_p num_beams finetuning_task task_specific_params
    bad_words_ids begin_suppress_tokens suppress_tokens forced_bos_token_id forced_eos_token_id
    decoder_start_token_id diversity_penalty early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty length_penalty no_repeat_ngram_size num_beam_groups
    num_return_sequences output_scores pruned_heads remove_invalid_values repetition_penalty
    return_dict_in_generate tf_legacy_loss tie_encoder_decoder typical_p max_window_layers
    use_sliding_window neftune_noise_alpha
""")
)
ROPE_READ = frozenset(
    _words("""
    rope_type type rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor
    original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate
""")
)
# Keys of other models that would change the result: refused unless they are off.
FOREIGN = frozenset(
    _words("""
    attn_logit_softcapping final_logit_softcapping logit_scale logits_scaling residual_multiplier
    embedding_multiplier attention_multiplier query_pre_attn_scalar qk_layernorm use_qk_norm qk_norm
    clip_qkv alibi no_rope_layers layer_types num_experts num_local_experts n_routed_experts parallel_attn
    use_parallel_residual rope_interleaved position_embedding_type norm_type final_w_bias
""")
)


def model_config(values: Mapping[str, Any], source: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """The decoder that ``config.json`` describes, and notes; an error for what the decoder cannot compute.

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
    if not isinstance(kind, str) or kind not in ACTIVATIONS:
        raise CheckpointError(
            f"{source}: model_type is {kind!r}; readable: {', '.join(ACTIVATIONS)}",
            hint="this decoder computes the Nemotron-4 and the Llama block, nothing else",
        )
    _refuse_unsupported(reader, kind, values)
    hidden_size = reader.integer("hidden_size")
    num_heads = reader.integer("num_attention_heads")
    context = reader.integer("max_position_embeddings")
    try:
        config = ModelConfig(
            num_layers=reader.integer("num_hidden_layers"),
            hidden_size=hidden_size,
            ffn_hidden_size=reader.integer("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=reader.integer("num_key_value_heads", default=num_heads),
            head_dim=reader.integer("head_dim", "kv_channels", default=hidden_size // max(num_heads, 1)),
            vocab_size=reader.integer("vocab_size"),
            context_length=context,
            norm="layernorm1p" if kind == "nemotron" else "rmsnorm",
            norm_eps=reader.number(_EPS[kind], default=1e-5 if kind == "nemotron" else 1e-6),
            mlp="relu2" if kind == "nemotron" else "swiglu",
            rotary_fraction=_rotary_fraction(reader, kind),
            rope_theta=reader.number("rope_theta", default=10000.0),
            rope_scaling=_rope_scaling(reader.get("rope_scaling") or rope, source, values, context),
            tie_embeddings=reader.flag("tie_word_embeddings"),
            attention_bias=reader.flag("attention_bias"),
            init_std=reader.number("initializer_range", default=0.02),
            num_reward_attributes=reader.integer("num_reward_attributes", default=0),
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error.message}", hint=error.hint) from error
    return config, tuple(reader.notes)


class _Reader:
    """Typed look-ups under several spellings; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: Path) -> None:
        self._values, self._source = values, source
        self.notes: list[str] = []

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


def _rotary_fraction(reader: _Reader, kind: str) -> float:
    """As transformers: Nemotron models rotate ``partial_rotary_factor`` of each head, Llama models all of it.

    Where a Nemotron file has only the older ``rope_percent``, that counts, as in vLLM.
    """
    older = ("rope_percent", "rope_percentage")
    if kind != "nemotron":
        for name in ("partial_rotary_factor", *older):
            if reader.get(name) not in (None, 1, 1.0):
                reader.notes.append(f"config.json: {name} is not used: a {kind} model rotates whole heads")
        return 1.0
    used = next((name for name in older if reader.get(name) is not None), None)
    if reader.get("partial_rotary_factor") is None and used is not None:
        reader.notes.append(f"config.json: {used} counts, since partial_rotary_factor is absent")
    return reader.number("partial_rotary_factor", *older, default=0.5)


def _refuse_unsupported(reader: _Reader, kind: str, values: Mapping[str, Any]) -> None:
    activation = reader.get("hidden_act", ACTIVATIONS[kind][0])
    if activation not in ACTIVATIONS[kind]:
        raise reader.refuse(
            f"hidden_act is {activation!r}; a {kind} block here computes {ACTIVATIONS[kind][0]!r}",
            "the weights would give other values under another activation",
        )
    if reader.flag("mlp_bias"):
        raise reader.refuse("mlp_bias is true", "the MLP here has no bias")
    for name in sorted(FOREIGN & values.keys()):
        if not _is_off(name, values[name]):
            raise reader.refuse(
                f"{name} is {values[name]!r}, which a {kind} block here does not compute",
                "the text would look right and be wrong; a model without it is needed",
            )
    window, context = reader.get("sliding_window"), reader.get("max_position_embeddings", 0)
    if kind == "mistral" and "sliding_window" not in values:
        window = 4096  # transformers' own where the file is silent; null is none
    if kind == "mistral" and window is not None and window < context:
        raise reader.refuse(
            f"sliding_window is {window} and the context {context}; attention here is full",
            f"to use {window} tokens: set sliding_window to null and max_position_embeddings to {window}",
        )
    if kind != "mistral" and window is not None and window < context:
        reader.notes.append(f"config.json: sliding_window is not used: a {kind} model attends to everything")
    unknown = sorted(values.keys() - READ - IGNORED - FOREIGN)
    scaling = values.get("rope_scaling") or values.get("rope_parameters")
    for name in sorted(scaling.keys() - ROPE_READ) if isinstance(scaling, Mapping) else ():
        reader.notes.append(f"config.json: {name} in the RoPE scaling is not known here and not used")
    wrong_eps = [
        name for name in ("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon") if name in unknown
    ]
    for name in wrong_eps:
        reader.notes.append(f"config.json: {name} is not used: {_EPS[kind]} counts")
    if left := [name for name in unknown if name not in wrong_eps]:
        reader.notes.append(f"config.json: not known here and not used: {', '.join(left)}")


def _is_off(name: str, value: Any) -> bool:
    if name == "layer_types":
        return isinstance(value, list) and set(value) <= {"full_attention"}
    if name == "position_embedding_type":
        return value in ("rope", None)
    if name == "no_rope_layers":
        return not value or (isinstance(value, list) and all(entry == 1 for entry in value))
    return value in (None, False, 0, "") or (
        value in (1, 1.0) and name.endswith(("multiplier", "scale", "scaling"))
    )


_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope_scaling(values: Any, source: Path, config: Mapping[str, Any], context: int) -> RopeScaling | None:
    """transformers 4.44 calls the kind ``type`` or ``rope_type``; 5.x has it in ``rope_parameters``."""
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{source}: rope_scaling is {values!r}; expected an object")
    kind = values.get("rope_type") or values.get("type") or "default"
    if kind == "default":
        return None
    if kind not in _NUMBERS:
        raise CheckpointError(
            f"{source}: rope scaling of kind {kind!r}; readable: {', '.join(_NUMBERS)}",
            hint="remove rope_scaling to use the model within its original context length",
        )
    missing = [name for name in _NUMBERS[kind] if not _is_number(values.get(name))]
    if kind == "yarn" and missing == ["factor"] and values.get("factor") is None:
        missing = []  # the ratio of both context lengths
    if missing:
        raise CheckpointError(f"{source}: rope scaling {kind!r} has no number for {', '.join(missing)}")
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind="linear" if kind == "linear" else "dynamic", factor=float(values["factor"]))
    if kind == "yarn":
        return _yarn(values, config, context)
    return RopeScaling(
        kind="llama3",
        factor=float(values["factor"]),
        low_freq_factor=float(values["low_freq_factor"]),
        high_freq_factor=float(values["high_freq_factor"]),
        original_context_length=int(values["original_max_position_embeddings"]),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _yarn(values: Mapping[str, Any], config: Mapping[str, Any], context: int) -> RopeScaling:
    """As transformers fills in what is absent."""
    given = config.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    original = int(given or context)
    factor = float(values["factor"]) if values.get("factor") is not None else context / original
    attention = values.get("attention_factor")
    mscale, mscale_all = values.get("mscale"), values.get("mscale_all_dim")
    if attention is None and mscale and mscale_all:
        attention = yarn_attention(factor, mscale) / yarn_attention(factor, mscale_all)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_length=original,
        attention_factor=yarn_attention(factor) if attention is None else float(attention),
        beta_fast=float(values.get("beta_fast") or 32),
        beta_slow=float(values.get("beta_slow") or 1),
        truncate=bool(values.get("truncate", True)),
    )
