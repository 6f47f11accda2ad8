"""GGUF files of architectures nemotron and llama, under Hugging Face names and conventions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemotron4.checkpoint.dequantize import dequantize
from nemotron4.checkpoint.files import read_bytes
from nemotron4.checkpoint.gguf_config import ROPE_FACTORS, model_config
from nemotron4.checkpoint.gguf_file import read_gguf
from nemotron4.checkpoint.gguf_parts import part_of
from nemotron4.checkpoint.interface import Format, TensorInfo
from nemotron4.checkpoint.templates import missing_template_note, prompt_format
from nemotron4.checkpoint.turns import end_token_ids
from nemotron4.checkpoint.vocabulary import checked_tokenizer
from nemotron4.errors import CheckpointError, unknown_name
from nemotron4.model.config import ModelConfig
from nemotron4.text.gguf_vocabulary import from_gguf
from nemotron4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat

_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class GgufCheckpoint:
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
            name: TensorInfo(name, tensor.shape, tensor.kind.name, tensor.path)
            for name, stored in self._stored_names.items()
            for tensor in [self._file.tensors[stored]]
        }

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self._stored_names:
            message, hint = unknown_name("tensor", name, self._stored_names)
            raise CheckpointError(f"{self.path}: {message}", hint=hint)
        return self.read_rows(name, 0, self.tensors[name].shape[0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of a tensor: rows are quantised one by one."""
        stored = self._file.tensors[self._stored_names[name]]
        num_heads = self._num_interleaved_heads(name)
        first, last = start, stop
        if num_heads is not None:  # rows change places within their head
            head_dim = self.config.head_dim
            first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        row_bytes = stored.num_bytes // stored.shape[0]
        data = read_bytes(stored.path, name, stored.offset + first * row_bytes, (last - first) * row_bytes)
        if num_heads is not None:
            data = to_rotate_half(data, (last - first) // self.config.head_dim, self.config.head_dim)
            data = data[(start - first) * row_bytes : (stop - first) * row_bytes]
        part = replace(stored, shape=(stop - start, *stored.shape[1:]))
        is_gamma = self._is_nemotron and name.endswith("norm.weight")
        try:
            tensor = dequantize(data, part, torch.float32 if is_gamma else dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{stored.path}: {error.message}", hint=error.hint) from error
        if is_gamma:
            tensor = tensor - 1  # GGUF stores gamma, Hugging Face gamma - 1
        return tensor if dtype is None else tensor.to(dtype)

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
    def _template(self) -> str | None:
        template = self._metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    @cached_property
    def _prompt_format(self) -> PromptFormat | None:
        return prompt_format(self._template, self.tokenizer, is_nemotron=self._is_nemotron)

    def prompt_format(self) -> PromptFormat | None:
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
        is_llama3 = self._metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3")
        is_sentencepiece = self._metadata.get("tokenizer.ggml.model") == "llama"
        return not self._is_nemotron and (is_sentencepiece or is_llama3)


def to_rotate_half(data: torch.Tensor, num_heads: int, head_dim: int) -> torch.Tensor:
    """Undo the row order that llama.cpp's converter gives q and k of Llama models.

    There rows (2i, 2i + 1) of a head rotate together; here rows (i, i + head_dim / 2). ``data`` are the
    stored bytes: every row is quantised by itself, so whole rows can change places.
    """
    pairs = data.numpy().reshape(num_heads, head_dim // 2, 2, -1)
    return torch.from_numpy(pairs.swapaxes(1, 2).reshape(-1))


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
