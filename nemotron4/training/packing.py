"""Samples of different lengths laid end to end in one row, without padding.

Every micro-batch is one packed row: attention stays within a segment and positions count from 0 in each. The
segments of one sample, as the two answers of a pair, have their common beginning once in the row, and each
goes on from it. So packing changes how fast a step is and nothing else.

Legend: N tokens of the row, P positions whose next token is trained, S segments of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from nemotron4.errors import DataError
from nemotron4.model.causal_attention import causal_attention
from nemotron4.training.samples import Sample

# A common beginning, and what goes on from it; of a segment that shares nothing, its length alone.
Run = tuple[int, ...]


@dataclass(frozen=True)
class PackedRow:
    """A micro-batch."""

    samples: tuple[Sample, ...]
    tokens_N: Tensor
    positions_N: Tensor
    predict_P: Tensor  # index in the row of the token that predicts
    target_P: Tensor  # id of the token to be predicted
    segment_P: Tensor  # segment of the row (0..S-1) of each predicted token
    last_S: Tensor  # index in the row of each segment's last token
    runs: tuple[Run, ...]
    num_padding: int = field(default=0)
    # The loss's derivative to every log-probability of the row, where the stage knows it before.
    slope: float | None = None

    @property
    def num_segments(self) -> int:
        return sum(len(sample.segments) for sample in self.samples)

    def to(self, device: torch.device | str) -> PackedRow:
        tensors = {
            name: getattr(self, name).to(device)
            for name in ("tokens_N", "positions_N", "predict_P", "target_P", "segment_P", "last_S")
        }
        return replace(self, **tensors)


def pack(samples: Sequence[Sample], *, pad_to: int | None = None, shares: bool = True) -> PackedRow:
    """Lay the samples' segments end to end; ``pad_to`` fills the row with a segment that trains nothing.

    Without ``shares`` every segment has all of its tokens: slower, and the same result.
    """
    tokens: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    last: list[int] = []
    runs: list[Run] = []
    for sample in samples:
        num_shared = sample.num_shared if shares else 0
        beginning = len(tokens)
        if num_shared:
            tokens.extend(sample.segments[0].tokens[:num_shared])
            positions.extend(range(num_shared))
            runs.append((num_shared, *(len(segment.tokens) - num_shared for segment in sample.segments)))
        for segment in sample.segments:
            start = len(tokens) - num_shared  # where the segment would begin, had it all of its tokens
            tokens.extend(segment.tokens[num_shared:])
            positions.extend(range(num_shared, len(segment.tokens)))
            trained = [i for i, is_trained in enumerate(segment.is_trained) if is_trained and i > 0]
            # The first token behind the common beginning is predicted by the last one in it.
            predict.extend((start if i > num_shared else beginning) + i - 1 for i in trained)
            target.extend(segment.tokens[i] for i in trained)
            owner.extend([len(last)] * len(trained))
            last.append(len(tokens) - 1)
            if not num_shared:
                runs.append((len(segment.tokens),))
    num_padding = 0 if pad_to is None else pad_to - len(tokens)
    assert num_padding >= 0, f"{len(tokens)} tokens do not fit in a row of {pad_to}"
    tokens.extend([0] * num_padding)
    positions.extend(range(num_padding))
    if num_padding:
        runs.append((num_padding,))
    return PackedRow(
        samples=tuple(samples),
        tokens_N=torch.tensor(tokens, dtype=torch.long),
        positions_N=torch.tensor(positions, dtype=torch.long),
        predict_P=torch.tensor(predict, dtype=torch.long),
        target_P=torch.tensor(target, dtype=torch.long),
        segment_P=torch.tensor(owner, dtype=torch.long),
        last_S=torch.tensor(last, dtype=torch.long),
        runs=tuple(runs),
        num_padding=num_padding,
    )


def plan_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices per row, no row above ``max_tokens``: first fit, longest first, ties in order.

    A sample longer than a row is an error: dropping or cutting is decided when the data is read.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > max_tokens:
            raise DataError(
                f"a sample of {length} tokens does not fit in a row of {max_tokens}",
                hint="raise batch.row_tokens, or lower data.max_length (a pair counts both answers)",
            )
        for row, space in enumerate(free):
            if length <= space:
                rows[row].append(index)
                free[row] -= length
                break
        else:
            rows.append([index])
            free.append(max_tokens - length)
    return [sorted(row) for row in rows]


class PackedAttend:
    """Causal attention within each segment of a packed row: the work is the sum of squares of the lengths."""

    def __init__(self, runs: Sequence[Run]) -> None:
        # Neighbours of one form are one batch.
        self._runs = [(len(list(same)), run) for run, same in groupby(runs)]
        self._sizes = [count * sum(run) for count, run in self._runs]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, H, E), (N, K, E), (N, K, E) -> (N, H, E)."""
        # A split, because the gradient of slices is a whole tensor of zeros for each of them.
        parts = zip(*(torch.split(x, self._sizes) for x in (q, k, v)), strict=True)
        outputs = [
            _attend_run(run, *(x.unflatten(0, (count, sum(run))) for x in part)).flatten(0, 1)
            for (count, run), part in zip(self._runs, parts, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_run(run: Run, q_BTHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor) -> Tensor:
    """B runs of one form; what goes on from the common beginning sees that and itself."""
    if len(run) == 1:
        return causal_attention(q_BTHE, k_BTKE, v_BTKE)
    qs, ks, vs = (torch.split(x, list(run), dim=1) for x in (q_BTHE, k_BTKE, v_BTKE))
    outputs = [causal_attention(qs[0], ks[0], vs[0])]
    for q, k, v in zip(qs[1:], ks[1:], vs[1:], strict=True):
        outputs.append(causal_attention(q, torch.cat([ks[0], k], dim=1), torch.cat([vs[0], v], dim=1)))
    return torch.cat(outputs, dim=1)
