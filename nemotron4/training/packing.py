"""Samples of different lengths laid end to end in one row, without padding.

Every micro-batch is one packed row: its segments share nothing, because attention stays within a segment and
positions count from 0 in each. So packing changes how fast a step is and nothing else.

Legend: N tokens of the row, P positions whose next token is trained, S segments of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
from torch import Tensor

from nemotron4.errors import DataError
from nemotron4.model.causal_attention import causal_attention


@dataclass(frozen=True)
class Segment:
    """One token sequence; ``is_trained[i]`` says whether token i is a target (the first never is)."""

    tokens: tuple[int, ...]
    is_trained: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.is_trained), "one flag per token"

    @property
    def num_trained(self) -> int:
        """Trained tokens that have a predecessor to be predicted from."""
        return sum(self.is_trained[1:])


@dataclass(frozen=True)
class Sample:
    """One unit of the loss: a text, a pair (chosen, rejected), or an answer with its mismatched twin.

    ``labels`` are the stage's own numbers: rewards of a pair, attributes, desirability. ``where`` is the
    row's ``file:line`` for messages.
    """

    segments: tuple[Segment, ...]
    labels: tuple[float, ...] = ()
    where: str = ""
    reference: tuple[float, ...] = ()  # log-probability of each segment under the reference model, nats

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.tokens) for segment in self.segments)


@dataclass(frozen=True)
class PackedRow:
    """A micro-batch. ``positions_N`` is 0 where a segment starts, so it also says where segments end."""

    samples: tuple[Sample, ...]
    tokens_N: Tensor
    positions_N: Tensor
    predict_P: Tensor  # index in the row of the token that predicts
    target_P: Tensor  # id of the token to be predicted
    segment_P: Tensor  # segment of the row (0..S-1) of each predicted token
    last_S: Tensor  # index in the row of each segment's last token
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
        return PackedRow(self.samples, num_padding=self.num_padding, **tensors)


def pack(samples: Sequence[Sample], *, pad_to: int | None = None) -> PackedRow:
    """Lay the samples' segments end to end; ``pad_to`` fills the row with a segment that trains nothing."""
    tokens: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    target: list[int] = []
    owner: list[int] = []
    last: list[int] = []
    for index, segment in enumerate(segment for sample in samples for segment in sample.segments):
        start = len(tokens)
        tokens.extend(segment.tokens)
        positions.extend(range(len(segment.tokens)))
        trained = [i for i, is_trained in enumerate(segment.is_trained) if is_trained and i > 0]
        predict.extend(start + i - 1 for i in trained)
        target.extend(segment.tokens[i] for i in trained)
        owner.extend([index] * len(trained))
        last.append(len(tokens) - 1)
    num_padding = 0 if pad_to is None else pad_to - len(tokens)
    assert num_padding >= 0, f"{len(tokens)} tokens do not fit in a row of {pad_to}"
    tokens.extend([0] * num_padding)
    positions.extend(range(num_padding))
    return PackedRow(
        samples=tuple(samples),
        tokens_N=torch.tensor(tokens, dtype=torch.long),
        positions_N=torch.tensor(positions, dtype=torch.long),
        predict_P=torch.tensor(predict, dtype=torch.long),
        target_P=torch.tensor(target, dtype=torch.long),
        segment_P=torch.tensor(owner, dtype=torch.long),
        last_S=torch.tensor(last, dtype=torch.long),
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

    def __init__(self, positions_N: Tensor) -> None:
        starts = (positions_N == 0).nonzero()[:, 0].tolist()
        lengths = [stop - start for start, stop in pairwise([*starts, len(positions_N)])]
        # Neighbours of one length are one batch.
        self._runs = [(len(list(same)), length) for length, same in groupby(lengths)]
        self._sizes = [count * length for count, length in self._runs]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(N, H, E), (N, K, E), (N, K, E) -> (N, H, E)."""
        # A split, because the gradient of slices is a whole tensor of zeros for each of them.
        parts = zip(*(torch.split(x, self._sizes) for x in (q, k, v)), strict=True)
        outputs = [
            causal_attention(*(x.unflatten(0, run) for x in part)).flatten(0, 1)
            for run, part in zip(self._runs, parts, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
