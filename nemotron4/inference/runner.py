"""One step of the engine on the device: planned slices in, logits out.

Shape suffixes: N = packed rows of all slices, R = rows that complete a sequence, D = hidden size,
V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemotron4.inference.packed_linear import LONE_ROW_COPIES
from nemotron4.inference.scheduler import Slice
from nemotron4.model.kv_cache import CachedAttend, KVCache, Segment
from nemotron4.model.transformer import Transformer


class StepResult(NamedTuple):
    hidden_ND: Tensor
    first_rows: list[int]  # of each slice
    logits_RV: (
        Tensor  # of the last row of each slice that completes, float32; may be wider than the vocabulary
    )


class ModelRunner:
    """Holds the model and its cache; computes slices, keeps nothing else between steps."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model = model
        self.cache = cache
        self._device = cache.keys[0].device
        self._dtype = cache.keys[0].dtype

    def run(self, slices: Sequence[Slice]) -> StepResult:
        tokens: list[int] = []
        positions: list[np.ndarray] = []
        segments: list[Segment] = []
        first_rows: list[int] = []
        for planned in slices:
            sequence = planned.sequence
            first_rows.append(len(tokens))
            tokens += sequence.token_ids(planned.start, planned.end)
            positions.append(np.arange(planned.start, planned.end))
            num_prompt = len(sequence.prompt_ids)
            segments.append(Segment(sequence.blocks, planned.start, planned.end, num_prompt))
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
