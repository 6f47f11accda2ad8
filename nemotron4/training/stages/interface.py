"""The three things a stage tells the trainer: its loss, its count, its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from nemotron4.training.losses import SumCount
from nemotron4.training.packing import PackedRow

# Name -> (sum, count), added over rows and processes. Names that start with "_" are inputs of ``summarise``.
Totals = Mapping[str, tuple[float, float]]
Score = Callable[[PackedRow], Tensor]
AddUp = Callable[[Sequence[float]], list[float]]


@dataclass(frozen=True)
class Terms:
    """One row's share of the step's loss, and numbers worth seeing."""

    loss: SumCount
    totals: Totals = field(default_factory=dict)


class Stage:
    """An objective. It holds settings and no state, so any row can be scored anywhere.

    ``has_known_slope``: the loss's derivative to each score is the same, whatever the scores are.
    """

    has_known_slope: ClassVar[bool] = False

    def count(self, row: PackedRow) -> float:
        """The row's share of the divisor, known from the data alone."""
        raise NotImplementedError

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        """Loss and metrics of a row from its scores; ``terms(...).loss.count`` equals ``count(row)``."""
        raise NotImplementedError

    def prepare(self, rows: Sequence[PackedRow], score: Score, add_up: AddUp) -> Stage:
        """The stage for one step, with what must be known of the whole batch first (KTO's baseline).

        ``score`` runs the model without gradients; ``add_up`` adds numbers over all processes.
        """
        return self

    def summarise(self, totals: Totals) -> dict[str, float]:
        """Metrics of a step from its added-up totals."""
        return means(totals)


def means(totals: Totals) -> dict[str, float]:
    """Sum over count of every public total; one without a term is left out, not zero."""
    return {
        name: total / count for name, (total, count) in totals.items() if count and not name.startswith("_")
    }
