"""GGUF files of architectures nemotron and llama, under Hugging Face names and conventions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from nemotron4.checkpoint.cache import part_of
from nemotron4.checkpoint.gguf_file import GgufFile, read_gguf
from nemotron4.checkpoint.interface import (
    Array,
    Format,
    OwnOrChosenFormat,
    RawTensor,
    TensorInfo,
    checked_tokenizer,
    end_token_ids,
    missing_template_note,
    prompt_format,
)
from nemotron4.checkpoint.safetensors import read_bytes
from nemotron4.errors import CheckpointError, ConfigError, unknown_name
from nemotron4.model.config import ModelConfig, RopeScaling, yarn_attention
from nemotron4.text.gguf_vocabulary import WHOLE_WORDS, from_gguf
from nemotron4.text.tokenizer import Tokenizer
from nemotron4.text.tokenizer_files import TOOL_USE, joined_templates

if TYPE_CHECKING:
    import torch

    from nemotron4.text.prompt import PromptFormat


ROPE_FACTORS = "rope_freqs.weight"


def model_config(file: GgufFile) -> ModelConfig:
    """The decoder that the metadata describes; an error for whatever the decoder cannot compute."""
    path, metadata = file.path, file.metadata
    kind = metadata.get("general.architecture")
    if kind not in ("nemotron", "llama"):
        raise CheckpointError(
            f"{path}: architecture is {kind!r}; readable: nemotron, llama",
            hint="this decoder computes the Nemotron-4 and the Llama block, nothing else",
        )

    def number(key: str, default: float | None = None) -> float:
        value = metadata.get(f"{kind}.{key}", default)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]  # one number for each layer, all the same
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path}: {kind}.{key} is {value!r}; expected a number")
        return value

    def integer(key: str, default: int | None = None) -> int:
        value = number(key, default)
        if value != int(value):
            raise CheckpointError(f"{path}: {kind}.{key} is {value!r}; expected an integer")
        return int(value)

    is_nemotron = kind == "nemotron"
    if integer("expert_count", 0):
        raise CheckpointError(
            f"{path}: {kind}.expert_count is {integer('expert_count')}; expected a dense model"
        )
    hidden_size, num_heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", _rows(file, "blk.0.attn_q.weight") // max(num_heads, 1))
    if integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{path}: keys and values have different lengths; expected one head dim")
    rotary_dim = integer("rope.dimension_count", head_dim)
    eps = "attention.layer_norm_epsilon" if is_nemotron else "attention.layer_norm_rms_epsilon"
    try:
        return ModelConfig(
            num_layers=integer("block_count"),
            hidden_size=hidden_size,
            ffn_hidden_size=integer("feed_forward_length"),
            num_heads=num_heads,
            num_kv_heads=integer("attention.head_count_kv", num_heads),
            head_dim=head_dim,
            vocab_size=_rows(file, "token_embd.weight"),
            context_length=integer("context_length"),
            norm="layernorm1p" if is_nemotron else "rmsnorm",
            norm_eps=_shortest(number(eps)),
            mlp="relu2" if is_nemotron else "swiglu",
            rotary_fraction=_rotary_fraction(path, is_nemotron, rotary_dim, head_dim, hidden_size, num_heads),
            rope_theta=_shortest(number("rope.freq_base", 10000.0)),
            rope_scaling=_rope_scaling(file, kind),
            tie_embeddings="output.weight" not in file.tensors,
            attention_bias="blk.0.attn_q.bias" in file.tensors,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error


def _rows(file: GgufFile, name: str) -> int:
    tensor = file.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        found = "missing" if tensor is None else f"of shape {list(tensor.shape)}; expected a matrix"
        raise CheckpointError(f"{file.path}: tensor {name!r} is {found}")
    return tensor.shape[0]


def _shortest(value: float) -> float:
    """The decimal that a float32 was written from: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _rotary_fraction(
    path: Path, is_nemotron: bool, rotary_dim: int, head_dim: int, hidden_size: int, num_heads: int
) -> float:
    if not is_nemotron:
        if rotary_dim != head_dim:
            raise CheckpointError(
                f"{path}: llama.rope.dimension_count is {rotary_dim}; expected the head dim, {head_dim}"
            )
        return 1.0
    # The converter computes int(fraction * hidden) // heads, which is wrong where head_dim is not
    # hidden / heads (Minitron-8B: 42 for 64). Every such model of the family rotates half of each head.
    if head_dim * num_heads != hidden_size and rotary_dim == hidden_size // 2 // num_heads:
        return 0.5
    fraction = rotary_dim / head_dim
    return fraction if int(head_dim * fraction) == rotary_dim else math.nextafter(fraction, 1.0)


def _rope_scaling(file: GgufFile, kind: str) -> RopeScaling | None:
    # As llama.cpp: a factor without a type is linear, and files of 2023 call it ``scale_linear``.
    given = file.metadata.get(f"{kind}.rope.scaling.factor", file.metadata.get(f"{kind}.rope.scale_linear"))
    silent = "none" if given in (None, 0, 1) else "linear"
    scaling = file.metadata.get(f"{kind}.rope.scaling.type", silent)
    if scaling not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{file.path}: RoPE scaling of kind {scaling!r}; readable: none, linear, yarn")
    if ROPE_FACTORS in file.tensors:
        if scaling != "none":
            raise CheckpointError(
                f"{file.path}: RoPE scaling of kind {scaling!r} and {ROPE_FACTORS!r} together"
            )
        return RopeScaling(kind="factors", factors=_rope_factors(file))
    if scaling == "none":
        return None

    def number(key: str, default: float) -> float:
        return _shortest(float(file.metadata.get(f"{kind}.rope.scaling.{key}", default)))

    factor = _shortest(float(given or 1.0))
    if scaling == "linear":
        return RopeScaling(kind="linear", factor=factor)
    context = file.metadata.get(f"{kind}.context_length", 0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_context_length=int(number("original_context_length", context)),
        attention_factor=number("attn_factor", 1.0) * yarn_attention(factor),
        beta_fast=number("yarn_beta_fast", 32.0),
        beta_slow=number("yarn_beta_slow", 1.0),
    )


def _rope_factors(file: GgufFile) -> tuple[float, ...]:
    """What the frequency of each rotated pair is divided by: llama3's scaling as llama.cpp stores it."""
    stored = file.tensors[ROPE_FACTORS]
    if stored.kind != GGMLQuantizationType.F32 or len(stored.shape) != 1:
        raise CheckpointError(
            f"{file.path}: tensor {ROPE_FACTORS!r} is {stored.kind.name} of shape {list(stored.shape)}; "
            "expected a vector of F32"
        )
    values = np.fromfile(file.path, "<f4", count=stored.shape[0], offset=stored.offset)
    if not (values > 0).all():
        raise CheckpointError(f"{file.path}: tensor {ROPE_FACTORS!r} holds factors that are not positive")
    return tuple(values.tolist())


_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


class GgufCheckpoint(OwnOrChosenFormat):
    """One GGUF file with its vocabulary, or the parts of one. See ``interface.Checkpoint``."""

    format: Format = "gguf"

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        self._file = read_gguf(path)
        self.path = path = self._file.path
        part = part_of(path.name)
        self.name = name or (path.stem if part is None else part.stem)
        self._metadata = self._file.metadata
        self.config: ModelConfig = model_config(self._file)
        self._stored_names = {
            _hugging_face_name(stored, path): stored
            for stored in self._file.tensors
            if stored != ROPE_FACTORS  # in the configuration already
        }
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tensor.shape, tensor.kind.name, tensor.path, tensor.num_bytes)
            for name, stored in self._stored_names.items()
            for tensor in [self._file.tensors[stored]]
        }

    def require_readable(self) -> None:
        """Types that cannot be expanded are named when they are read."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self._stored_names:
            message, hint = unknown_name("tensor", name, self._stored_names)
            raise CheckpointError(f"{self.path}: {message}", hint=hint)
        return self.read_rows(name, 0, self.tensors[name].shape[0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of a tensor: rows are quantised one by one."""
        import torch

        from nemotron4.checkpoint.gguf_file import dequantize

        stored = self._file.tensors[self._stored_names[name]]
        data = self._stored_rows(name, start, stop).reshape(-1)
        part = replace(stored, shape=(stop - start, *stored.shape[1:]))
        is_gamma = self._is_nemotron and name.endswith("norm.weight")
        try:
            tensor = dequantize(torch.from_numpy(data), part, torch.float32 if is_gamma else dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{stored.path}: {error.message}", hint=error.hint) from error
        if is_gamma:
            tensor = tensor - 1  # GGUF stores gamma, Hugging Face gamma - 1
        return tensor if dtype is None else tensor.to(dtype)

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor | None:
        stored = self._file.tensors[self._stored_names[name]]
        is_gamma = self._is_nemotron and name.endswith("norm.weight")
        if is_gamma and stored.kind.name != "F32":
            return None
        stop = stored.shape[0] if stop is None else stop
        rows_RX = self._stored_rows(name, start, stop)
        if is_gamma:
            rows_RX = (rows_RX.view(np.float32) - 1).view(np.uint8)
        return RawTensor(stored.kind.name, (stop - start, *stored.shape[1:]), rows_RX)

    def _stored_rows(self, name: str, start: int, stop: int) -> Array:
        """Bytes of each row, in Hugging Face's order."""
        stored = self._file.tensors[self._stored_names[name]]
        num_heads = self._num_interleaved_heads(name)
        first, last = start, stop
        if num_heads is not None:  # rows change places within their head
            head_dim = self.config.head_dim
            first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        row_bytes = stored.num_bytes // stored.shape[0]
        data = read_bytes(stored.path, name, stored.offset + first * row_bytes, (last - first) * row_bytes)
        rows_RX = data.reshape(last - first, row_bytes)
        if num_heads is not None:
            rows_RX = to_rotate_half(rows_RX, self.config.head_dim)[start - first : stop - first]
        return rows_RX

    def _num_interleaved_heads(self, name: str) -> int | None:
        """Heads of q and k of Llama models, whose rows llama.cpp orders in its own way; else None."""
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        num_heads = None if self._is_nemotron else heads.get(name.split(".")[-2])
        num_rows = self.tensors[name].shape[0]
        if num_heads is not None and num_rows != num_heads * self.config.head_dim:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has {num_rows} rows; "
                f"expected {num_heads} heads of {self.config.head_dim}"
            )
        return num_heads

    @property
    def _is_nemotron(self) -> bool:
        return self.config.norm == "layernorm1p"

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return checked_tokenizer(from_gguf(self._metadata), self.config, self.path)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    @property
    def _template(self) -> str | None:
        template = self._metadata.get("tokenizer.chat_template")
        tool_use = self._metadata.get(f"tokenizer.chat_template.{TOOL_USE}")
        if not isinstance(template, str):
            return None
        return joined_templates(template, tool_use if isinstance(tool_use, str) else None)

    @cached_property
    def _prompt_format(self) -> PromptFormat | None:
        return prompt_format(self._template, self.tokenizer, is_nemotron=self._is_nemotron)

    def own_format(self) -> PromptFormat | None:
        return self._prompt_format

    @property
    def notes(self) -> tuple[str, ...]:
        return missing_template_note(self.path, self._template, is_nemotron=self._is_nemotron)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = [self._metadata.get(f"tokenizer.ggml.{key}") for key in keys]
        return end_token_ids(
            [token_id for token_id in found if token_id is not None],
            self._tokenizer,
            is_nemotron=self._is_nemotron,
            template=self._template,
        )

    @property
    def bos_token_id(self) -> int | None:
        token_id = self._metadata.get("tokenizer.ggml.bos_token_id")
        return token_id if isinstance(token_id, int) else None

    @property
    def adds_bos(self) -> bool:
        """As llama.cpp where the file is silent, except that Nemotron models take no BOS."""
        setting = self._metadata.get("tokenizer.ggml.add_bos_token")
        if isinstance(setting, bool):
            return setting
        is_llama3 = self._metadata.get("tokenizer.ggml.pre") in WHOLE_WORDS
        is_sentencepiece = self._metadata.get("tokenizer.ggml.model") == "llama"
        return not self._is_nemotron and (is_sentencepiece or is_llama3)


def to_rotate_half(data_RX: Array, head_dim: int) -> Array:
    """Undo the row order that llama.cpp's converter gives q and k of Llama models. A copy.

    There rows (2i, 2i + 1) of a head rotate together; here rows (i, i + head_dim / 2). Every row is
    quantised by itself, so whole rows of stored bytes can change places.
    """
    pairs = data_RX.reshape(-1, head_dim // 2, 2, data_RX.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(data_RX.shape)


def _hugging_face_name(stored: str, path: Path) -> str:
    if stored in _MODEL_NAMES:
        return _MODEL_NAMES[stored]
    block, _, rest = stored.partition(".")
    layer, _, part = rest.partition(".")
    module, _, kind = part.partition(".")
    if block == "blk" and layer.isdecimal() and module in _LAYER_NAMES and kind in ("weight", "bias"):
        return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"
    raise CheckpointError(
        f"{path}: tensor {stored!r} belongs to no part of a Nemotron-4 or Llama block",
        hint="mixtures of experts, fused QKV and multimodal files are not read",
    )


def to_interleaved(rows_RC: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of ``to_rotate_half``, for rows of whole heads."""
    halves = rows_RC.reshape(-1, 2, head_dim // 2, *rows_RC.shape[1:])
    return halves.transpose(1, 2).flatten(0, 2)
