"""A step of the engine in PyTorch: on a GPU, with adapters next to the weights, and without a library.

Shape suffixes: N = packed rows of all slices, R = rows whose logits are wanted, D = hidden size,
V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.load import load_transformer
from nemotron4.inference.packed_linear import (
    LONE_ROW_COPIES,
    can_pack,
    pack,
    pack_block,
    pack_output_layer,
)
from nemotron4.inference.runner import Ahead, Array, StepResult, StepRunner
from nemotron4.inference.scheduler import Slice
from nemotron4.inference.torch_adapters import ModuleAdapters
from nemotron4.model.adapter_files import load_adapter
from nemotron4.model.adapters import PromptTableEmbedding
from nemotron4.model.kv_cache import CachedAttend, CacheSegment, KVCache
from nemotron4.model.transformer import Transformer


class ModelRunner:
    """A step as a forward pass of the module. Logits come to the CPU, where tokens are drawn."""

    most_ahead = 0

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model = model
        self.config = model.config
        self.cache = cache
        self.handle: int | None = None
        self.adapters: ModuleAdapters | None = None
        self._device = cache.keys[0].device
        self._dtype = cache.keys[0].dtype

    @torch.inference_mode()
    def run(self, slices: Sequence[Slice], ahead: Ahead | None = None) -> StepResult:
        assert ahead is None, "no token is drawn here"
        tokens: list[int] = []
        positions: list[np.ndarray] = []
        segments: list[CacheSegment] = []
        first_rows: list[int] = []
        result_rows: list[int] = []
        for planned in slices:
            sequence = planned.sequence
            first_rows.append(len(tokens))
            tokens += planned.token_ids()
            result_rows += range(len(tokens) - planned.num_results, len(tokens))
            positions.append(np.arange(planned.start, planned.end))
            num_prompt = len(sequence.prompt_ids)
            segments.append(CacheSegment(sequence.blocks, planned.start, planned.end, num_prompt))
        # Products read the weights fastest for a few rows; a lone row gets company that attends to nothing.
        missing = max(0, LONE_ROW_COPIES - len(tokens))
        tokens_N = torch.tensor(tokens + [0] * missing, device=self._device)
        positions_N = torch.from_numpy(np.concatenate([*positions, np.zeros(missing, np.int64)]))
        positions_N = positions_N.to(self._device)
        attend = CachedAttend(self.cache, segments, dtype=self._dtype)
        if self.adapters is not None:
            self.adapters.begin(slices, first_rows)
        hidden_ND = self.model.model(tokens_N, positions_N, attend)
        logits_RV = self.model.logits(hidden_ND[result_rows])
        return StepResult(hidden_ND, first_rows, logits_RV.cpu().numpy())

    @torch.inference_mode()
    def logits(self, hidden_ND: Tensor, start: int, end: int) -> Array:
        logits: Array = self.model.logits(hidden_ND[start:end]).cpu().numpy()
        return logits

    @torch.inference_mode()
    def hidden(self, hidden_ND: Tensor, start: int, end: int) -> Array:
        hidden: Array = hidden_ND[start:end].float().cpu().numpy()
        return hidden


def read_runner(
    checkpoint: Checkpoint, dtype_name: str, device_name: str, num_blocks: int, adapter: Path | None
) -> tuple[StepRunner, int]:
    """The model with its cache, and the number of virtual tokens that precede every prompt."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    device = torch.device(device_name)
    module = _load_module(checkpoint, dtype, device, adapter)
    cache = KVCache(checkpoint.config, num_blocks, dtype=dtype, device=device)
    embedding = module.model.embed_tokens
    num_virtual = embedding.num_virtual_tokens if isinstance(embedding, PromptTableEmbedding) else 0
    return ModelRunner(module, cache), num_virtual


def room_for_adapters(runner: StepRunner, checkpoint: Checkpoint) -> ModuleAdapters:
    """A bank for adapters next to the weights of a model that PyTorch computes."""
    assert isinstance(runner, ModelRunner), "the two that loading makes"
    runner.adapters = ModuleAdapters(runner.model, checkpoint)
    return runner.adapters


def read_again(runner: StepRunner, checkpoint: Checkpoint, dtype_name: str, device: str) -> StepRunner:
    """The same cache with other weights."""
    assert isinstance(runner, ModelRunner), "the two that loading makes"
    dtype: torch.dtype = getattr(torch, dtype_name)
    return ModelRunner(_load_module(checkpoint, dtype, torch.device(device), None), runner.cache)


def _load_module(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, adapter: Path | None
) -> Transformer:
    """The model, packed where that is possible; ``adapter``: one that stays next to the weights."""
    is_packed = can_pack(dtype, device)
    if adapter is not None:
        module, _ = load_transformer(checkpoint, dtype=dtype, device=device)
        load_adapter(module, adapter)
        if is_packed:
            pack(module)
        return module
    module, _ = load_transformer(
        checkpoint, dtype=dtype, device=device, block_loaded=pack_block if is_packed else None
    )
    if is_packed:
        pack_output_layer(module)
    return module.requires_grad_(False)
