"""One step of the engine on the device: planned slices in, logits out.

Shape suffixes: N = packed rows of all slices, R = rows that complete a sequence, D = hidden size,
V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nemotron4.inference.native.library import CStep
from nemotron4.inference.native.model import NativeCache, NativeModel
from nemotron4.inference.packed_linear import LONE_ROW_COPIES
from nemotron4.inference.scheduler import Slice
from nemotron4.model.config import ModelConfig
from nemotron4.model.kv_cache import CachedAttend, CacheSegment, KVCache
from nemotron4.model.transformer import Transformer


class StepResult(NamedTuple):
    hidden_ND: Tensor
    first_rows: list[int]  # of each slice
    logits_RV: (
        Tensor  # of the last row of each slice that completes, float32; may be wider than the vocabulary
    )


class StepRunner(Protocol):
    """What the engine's thread calls."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def cache(self) -> KVCache | NativeCache: ...

    def run(self, slices: Sequence[Slice]) -> StepResult: ...

    def logits(self, hidden_ND: Tensor, start: int, end: int) -> Tensor: ...


class NativeRunner:
    """A step as one call of the library."""

    def __init__(self, model: NativeModel) -> None:
        self.model = model
        self.config = model.config
        self.cache = model.cache

    def run(self, slices: Sequence[Slice]) -> StepResult:
        config = self.model.config
        tokens: list[int] = []
        first_rows, first_blocks, blocks = [0], [0], list[int]()
        positions: list[np.ndarray] = []
        last_rows: list[int] = []
        for planned in slices:
            tokens += planned.sequence.token_ids(planned.start, planned.end)
            positions.append(np.arange(planned.start, planned.end, dtype=np.int32))
            blocks += planned.sequence.blocks[: -(-planned.end // self.cache.block_size)]
            first_rows.append(len(tokens))
            first_blocks.append(len(blocks))
            if planned.completes:
                last_rows.append(len(tokens) - 1)
        arrays = [np.array(x, dtype=np.int32) for x in (tokens, first_rows, first_blocks, blocks, last_rows)]
        tokens_N, first_rows_S, first_blocks_S, blocks_array, last_rows_R = arrays
        positions_N = np.concatenate(positions)
        # Only log-probabilities of a prompt need what is left of the other rows.
        needs_hidden = not all(planned.sequence.can_share_prefix for planned in slices)
        hidden_ND = torch.empty(len(tokens) if needs_hidden else 0, config.hidden_size)
        logits_RV = torch.empty(len(last_rows), config.vocab_size)
        self.model.step(
            CStep(
                len(tokens),
                len(slices),
                len(last_rows),
                tokens_N.ctypes.data,
                positions_N.ctypes.data,
                first_rows_S.ctypes.data,
                first_blocks_S.ctypes.data,
                blocks_array.ctypes.data,
                last_rows_R.ctypes.data,
                hidden_ND.data_ptr() if needs_hidden else None,
                logits_RV.data_ptr(),
            )
        )
        return StepResult(hidden_ND, first_rows[:-1], logits_RV)

    def logits(self, hidden_ND: Tensor, start: int, end: int) -> Tensor:
        return self.model.logits(hidden_ND[start:end])


class ModelRunner:
    """The same in PyTorch: on a GPU, with a bottleneck adapter, and where no library can be built."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model = model
        self.config = model.config
        self.cache = cache
        self._device = cache.keys[0].device
        self._dtype = cache.keys[0].dtype

    def run(self, slices: Sequence[Slice]) -> StepResult:
        tokens: list[int] = []
        positions: list[np.ndarray] = []
        segments: list[CacheSegment] = []
        first_rows: list[int] = []
        for planned in slices:
            sequence = planned.sequence
            first_rows.append(len(tokens))
            tokens += sequence.token_ids(planned.start, planned.end)
            positions.append(np.arange(planned.start, planned.end))
            num_prompt = len(sequence.prompt_ids)
            segments.append(CacheSegment(sequence.blocks, planned.start, planned.end, num_prompt))
        # Products read the weights fastest for a few rows; a lone row gets company that attends to nothing.
        missing = max(0, LONE_ROW_COPIES - len(tokens))
        tokens_N = torch.tensor(tokens + [0] * missing, device=self._device)
        positions_N = torch.from_numpy(np.concatenate([*positions, np.zeros(missing, np.int64)]))
        positions_N = positions_N.to(self._device)
        attend = CachedAttend(self.cache, segments, dtype=self._dtype)
        hidden_ND = self.model.model(tokens_N, positions_N, attend)
        last_rows = [
            row + planned.end - planned.start - 1
            for row, planned in zip(first_rows, slices, strict=True)
            if planned.completes
        ]
        logits_RV = self.model.logits(hidden_ND[last_rows])
        return StepResult(hidden_ND, first_rows, logits_RV)

    def logits(self, hidden_ND: Tensor, start: int, end: int) -> Tensor:
        return self.model.logits(hidden_ND[start:end])
