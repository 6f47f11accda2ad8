"""One step of the engine on the device: planned slices in, logits out.

Shape suffixes: N = packed rows of all slices, R = rows whose logits are wanted, D = hidden size,
V = vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from nemotron4.engine import SamplingParams
from nemotron4.inference.native.adapters import NativeAdapter
from nemotron4.inference.native.library import CStep
from nemotron4.inference.native.model import NativeModel
from nemotron4.inference.sampling import c_draws
from nemotron4.inference.scheduler import Slice
from nemotron4.model.config import ModelConfig

Array = np.ndarray[Any, np.dtype[Any]]


class Ahead(NamedTuple):
    """How a sequence that runs alone draws its next tokens, so that it need not come back for each.

    It has blocks for all of them. A token of ``stops`` is the last.
    """

    draws: Sequence[tuple[SamplingParams, float]]  # with its point; one for each token
    stops: Collection[int]
    vocab_size: int


class StepResult(NamedTuple):
    hidden_ND: Any  # of the runner's own kind
    first_rows: list[int]  # of each slice
    logits_RV: (
        Array  # of the last rows of slices (``num_results``), float32; may be wider than the vocabulary
    )
    drawn: tuple[int, ...] = ()  # with ``Ahead``: the tokens, each from its row of the logits


class Cache(Protocol):
    """Blocks of keys and values."""

    num_blocks: int

    @property
    def block_size(self) -> int: ...

    @property
    def is_read_in_place(self) -> bool:
        """False if blocks that do not lie side by side cost a copy."""
        ...


class StepRunner(Protocol):
    """What the engine's thread calls."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def cache(self) -> Cache: ...

    @property
    def handle(self) -> int | None:
        """The library's engine, whose threads draw tokens, if there is one."""
        ...

    @property
    def most_ahead(self) -> int:
        """Tokens that ``run`` may draw in one call; 0: it takes no ``Ahead``."""
        ...

    def run(self, slices: Sequence[Slice], ahead: Ahead | None = None) -> StepResult: ...

    def logits(self, hidden_ND: Any, start: int, end: int) -> Array: ...

    def hidden(self, hidden_ND: Any, start: int, end: int) -> Array: ...


class NativeRunner:
    """A step as one call of the library."""

    most_ahead = 8

    def __init__(self, model: NativeModel) -> None:
        self.model = model
        self.config = model.config
        self.cache = model.cache
        self.handle: int | None = model.handle

    def run(self, slices: Sequence[Slice], ahead: Ahead | None = None) -> StepResult:
        num_more = len(ahead.draws) - 1 if ahead is not None else 0
        config = self.model.config
        tokens: list[int] = []
        first_rows, first_blocks, blocks = [0], [0], list[int]()
        positions: list[int] = []
        result_rows: list[int] = []
        for planned in slices:
            tokens += planned.token_ids()
            positions += range(planned.start, planned.end)
            blocks += planned.sequence.blocks[: -(-(planned.end + num_more) // self.cache.block_size)]
            first_rows.append(len(tokens))
            first_blocks.append(len(blocks))
            result_rows += range(len(tokens) - planned.num_results, len(tokens))
        # array and not numpy: a step of one small row takes as long as some of numpy's calls
        lists = (tokens, positions, first_rows, first_blocks, blocks, result_rows)
        arrays = [array("i", each) for each in lists]
        # Only log-probabilities of a prompt need what is left of the other rows.
        needs_hidden = any(planned.sequence.max_shared is not None for planned in slices)
        hidden_ND = np.empty((len(tokens) if needs_hidden else 0, config.hidden_size), np.float32)
        logits_RV = np.empty((len(result_rows) + num_more, config.vocab_size), np.float32)
        adapters_N = self._adapters(slices, len(tokens))
        step = CStep(
            len(tokens),
            len(slices),
            len(result_rows),
            *(each.buffer_info()[0] for each in arrays),
            hidden_ND.ctypes.data if needs_hidden else None,
            logits_RV.ctypes.data,
            None if adapters_N is None else adapters_N.ctypes.data,
        )
        drawn: tuple[int, ...] = ()
        if ahead is None:
            self.model.step(step)
        else:
            draws = c_draws([(None, ahead.vocab_size, *each) for each in ahead.draws])
            drawn = tuple(self.model.run_on(step, draws, ahead.stops))
        return StepResult(hidden_ND, first_rows[:-1], logits_RV[: len(drawn) or None], drawn)

    @staticmethod
    def _adapters(slices: Sequence[Slice], num_rows: int) -> Array | None:
        """Where the adapter of each row lies; 0: it has none."""
        addresses_N = None
        row = 0
        for planned in slices:
            end = row + planned.end - planned.start
            adapter = planned.sequence.adapter
            if isinstance(adapter, NativeAdapter):
                if addresses_N is None:
                    addresses_N = np.zeros(num_rows, np.uintp)
                addresses_N[row:end] = adapter.address
            row = end
        return addresses_N

    def logits(self, hidden_ND: Array, start: int, end: int) -> Array:
        return self.model.logits(hidden_ND[start:end])

    def hidden(self, hidden_ND: Array, start: int, end: int) -> Array:
        return hidden_ND[start:end]
