"""A real engine on a small random model, and a tokenizer of letters, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch

from nemotron4.checkpoint.interface import Checkpoint, TensorInfo
from nemotron4.engine import ModelInfo
from nemotron4.inference.engine import Engine
from nemotron4.inference.native.library import Form
from nemotron4.inference.native.model import NativeCache, read_model
from nemotron4.inference.packed_linear import can_pack, pack
from nemotron4.inference.runner import NativeRunner, StepRunner
from nemotron4.inference.torch_runner import ModelRunner
from nemotron4.model.config import ModelConfig
from nemotron4.model.kv_cache import KVCache
from nemotron4.model.transformer import Transformer

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=101,
    context_length=1024,
)


class LetterTokenizer:
    """Id i is the character chr(i); ids 0 to 31 are control pieces."""

    vocab_size = 101
    bos_id = 2
    eos_id = 3
    replaces_each_byte = True
    decodes_each_token = True

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.piece(i) for i in ids if not self.is_control(i))

    def token_bytes(self, token_id: int, *, is_first: bool = False) -> bytes:
        return b"" if self.is_control(token_id) else chr(token_id).encode()

    def piece(self, token_id: int) -> str:
        return chr(token_id)

    def token_id(self, piece: str) -> int | None:
        return ord(piece)

    def is_control(self, token_id: int) -> bool:
        return token_id < 32


def random_model(config: ModelConfig = SMALL, *, seed: int = 0) -> Transformer:
    """A model whose weights are large enough that greedy text wanders and sampling has choices."""
    model = Transformer(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3, generator=generator)
    return model


class ModuleCheckpoint:
    """A module's weights, read as those of a file are. See ``checkpoint.interface.Checkpoint``."""

    def __init__(self, model: Transformer) -> None:
        self.config = model.config
        self._state = model.state_dict()
        if self.config.tie_embeddings:
            del self._state["lm_head.weight"]
        self.path = Path("module")
        self.tensors = {
            name: TensorInfo(name, tuple(t.shape), "float32", self.path, 4 * t.numel())
            for name, t in self._state.items()
        }

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._state[name].to(dtype or torch.float32).clone()

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.read(name, dtype)[start:stop]

    def require_readable(self) -> None:
        """Every tensor is in memory."""

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> None:
        return None


EnginePath = Literal[
    "torch-float32", "torch-bfloat16", "torch-float16", "float32", "bfloat16", "int8", "int4", "int8-cache"
]
PATHS: tuple[EnginePath, ...] = (
    "torch-float32", "torch-bfloat16", "float32", "bfloat16", "int8", "int4", "int8-cache",
)  # fmt: skip
_KINDS = {  # of weights, of keys and values
    "float32": (Form.F32, Form.F32),
    "bfloat16": (Form.BF16, Form.BF16),
    "int8": (Form.S8, Form.BF16),
    "int4": (Form.U4, Form.BF16),
    "int8-cache": (Form.F32, Form.S8),
}


def small_runner(
    model: Transformer, path: EnginePath, num_blocks: int, *, num_threads: int = 2, is_for_few: bool = False
) -> StepRunner:
    if path in _KINDS:
        weights, kept = _KINDS[path]
        cache = NativeCache(model.config, num_blocks, kept)
        checkpoint = cast(Checkpoint, ModuleCheckpoint(model))
        read = read_model(checkpoint, weights, cache, num_threads=num_threads, is_for_few=is_for_few)
        return NativeRunner(read)
    dtype = getattr(torch, path.removeprefix("torch-"))
    model = model.to(dtype)
    if can_pack(dtype, torch.device("cpu")):
        pack(model)
    return ModelRunner(model, KVCache(model.config, num_blocks, dtype=dtype, device=torch.device("cpu")))


def small_engine(
    model: Transformer | None = None,
    *,
    num_blocks: int = 64,
    max_running: int = 16,
    max_waiting: int = 256,
    max_step_tokens: int = 128,
    path: EnginePath = "float32",
    num_speculative_tokens: int = 0,
) -> Engine:
    """``path``: one of those that ``load`` chooses from; names without "torch" are the library's."""
    model = model or random_model()
    config = model.config
    info = ModelInfo(
        name="small",
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        num_parameters=config.num_parameters,
        dtype=path.removeprefix("torch-"),
        device="cpu",
        eos_token_ids=(),
    )
    return Engine(
        small_runner(model, path, num_blocks),
        info,
        LetterTokenizer(),
        None,
        max_running=max_running,
        max_waiting=max_waiting,
        max_step_tokens=max_step_tokens,
        num_speculative_tokens=num_speculative_tokens,
    )


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(32, 101, (n,), generator=generator).tolist() for n in lengths]
