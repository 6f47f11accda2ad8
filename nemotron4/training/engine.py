"""Gradients of one step, and the law that makes them independent of how the step was cut.

The counts of all rows of all processes are added first; each row's loss sum is divided by that one number
before its backward pass. So neither rows, accumulation, packing nor processes change the gradient.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from nemotron4.errors import TrainingError
from nemotron4.model.adapters import adapted_modules
from nemotron4.training.mixed_precision import NarrowCopies
from nemotron4.training.packing import PackedRow, pack, plan_rows
from nemotron4.training.samples import Sample
from nemotron4.training.scorer import Scorer
from nemotron4.training.stage import Objective, Totals

T = TypeVar("T")


@dataclass(frozen=True)
class StepOutcome:
    """What one step's forward and backward passes found; the gradients are on the parameters."""

    loss: float
    totals: Totals
    num_tokens: int


@dataclass
class Sums:
    """What the rows of this process add up to before anything is divided."""

    loss: float = 0.0
    totals: dict[str, tuple[float, float]] = field(default_factory=dict)
    suspects: list[str] = field(default_factory=list)  # rows whose loss is not finite

    def add(self, loss: Tensor, totals: Totals, row: PackedRow) -> None:
        value = float(loss.detach())
        self.loss += value
        add_totals(self.totals, totals)
        if not math.isfinite(value):
            where = ", ".join(sample.where for sample in row.samples[:8] if sample.where) or "unknown rows"
            self.suspects.append(f"{value} on a packed row of {len(row.samples)} samples: {where}")


class TrainingEngine:
    """One process on one device. Subclasses split the same work over several.

    ``compute`` is the type of products and activations; weights, their gradients and a head stay float32.
    """

    def __init__(
        self, scorer: Scorer, *, device: torch.device | str = "cpu", compute: torch.dtype = torch.float32
    ) -> None:
        self.scorer = scorer
        self.device = torch.device(device)
        self.compute = compute

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by the model's own names; a tied weight once."""
        return {name: p for name, p in self.scorer.net.named_parameters() if p.requires_grad}

    @property
    def has_adapters(self) -> bool:
        return bool(adapted_modules(self.scorer.net))

    def rows(self, samples: Sequence[Sample], row_tokens: int) -> list[PackedRow]:
        """This process's share of a step, packed."""
        plan = plan_rows([sample.packed_tokens for sample in samples], row_tokens)
        return [pack([samples[i] for i in row]).to(self.device) for row in plan]

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes that hold different rows."""
        return list(values)

    def any_process(self, flag: bool) -> bool:
        """True on every process if it is true on one."""
        return flag

    def gathered(self, value: T) -> list[T]:
        """The values of all processes by rank, on every process."""
        return [value]

    def share(self, jobs: Sequence[T]) -> Sequence[T]:
        """This process's part of jobs that all processes know."""
        return jobs

    def joined(self, results: Sequence[T]) -> list[T]:
        """The results of everybody's share in the order of the jobs, on every process."""
        parts = self.gathered(results)
        return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]

    def whole_tensors(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Named tensors of this process's part of the model, and those of the other parts.

        One after the other, each whole and on every process; all processes must take all of them.
        """
        yield from tensors.items()

    def forward_backward(self, rows: Sequence[PackedRow], objective: Objective) -> StepOutcome:
        """Add the gradients of ``sum of losses / sum of counts`` to the parameters.

        A loss that is not finite is a TrainingError on every process, raised before any update.
        """
        objective, count = self._prepare(rows, objective, empty="no row of the step trains anything")
        sums = self._backward(rows, objective, count)
        result = self._result(sums, count, rows)
        if not math.isfinite(result.loss):
            suspects = [text for part in self.gathered(sums.suspects) for text in part]
            raise TrainingError(
                f"the loss is {'; '.join(dict.fromkeys(suspects))}",
                hint="no update was made; look at these rows, or lower optimizer.learning_rate",
            )
        return result

    def _prepare(
        self, rows: Sequence[PackedRow], objective: Objective, *, empty: str
    ) -> tuple[Objective, float]:
        """The objective for these rows, and the divisor: the counts of all rows of all processes."""
        objective = objective.prepare(rows, self.score, self.add_up)
        (count,) = self.add_up([sum(objective.count(row) for row in rows)])
        if count == 0:
            raise TrainingError(empty, hint="see nemotron4 doctor data")
        return objective, count

    def _backward(self, rows: Sequence[PackedRow], objective: Objective, count: float) -> Sums:
        sums = Sums()
        with self.computing():
            for row in self._with_slopes(rows, objective, count):
                terms = objective.terms(self.scorer(row), row)
                torch.autograd.backward(self._scaled_for_backward(terms.loss.sum / count))
                sums.add(terms.loss.sum, terms.totals, row)
        return sums

    def computing(self) -> contextlib.AbstractContextManager[None]:
        """The scorer's weights are in the type of ``compute`` within."""
        return contextlib.nullcontext() if self._copies is None else self._copies.in_place()

    @cached_property
    def _copies(self) -> NarrowCopies | None:
        """Made for the first pass, when the weights are there."""
        return None if self.compute == torch.float32 else NarrowCopies(self.scorer, self.compute)

    def _with_slopes(
        self, rows: Sequence[PackedRow], objective: Objective, count: float
    ) -> Sequence[PackedRow]:
        """The rows with what the backward pass will hand to their scores, where that is known before."""
        if not objective.has_known_slope:
            return rows
        found = []
        for row in rows:
            scores = torch.zeros(self.scorer.shape(row), device=self.device, requires_grad=True)
            loss = self._scaled_for_backward(objective.terms(scores, row).loss.sum / count)
            (slope_P,) = torch.autograd.grad(loss, scores)
            found.append(replace(row, slope=float(slope_P[0]) if len(slope_P) else 0.0))
        return found

    def _scaled_for_backward(self, loss: Tensor) -> Tensor:
        return loss

    def _result(self, sums: Sums, count: float, rows: Sequence[PackedRow]) -> StepOutcome:
        names = sorted(sums.totals)  # a stage reports the same names for every row, so processes agree
        flat = [x for name in names for x in sums.totals[name]]
        num_tokens = sum(sample.num_tokens for row in rows for sample in row.samples)
        loss, tokens, *rest = self.add_up([sums.loss, float(num_tokens), *flat])
        added = {name: (rest[2 * i], rest[2 * i + 1]) for i, name in enumerate(names)}
        return StepOutcome(loss / count, added, int(tokens))

    @torch.no_grad()
    def score(self, row: PackedRow) -> Tensor:
        """A row's scores without gradients, in evaluation mode."""
        was_training = self.scorer.training
        self.scorer.eval()
        with self.computing():
            scores: Tensor = self.scorer(row)
        self.scorer.train(was_training)
        return scores

    def scores(self, rows: Sequence[PackedRow]) -> Iterable[Tensor]:
        """``score`` of each row, in order."""
        return (self.score(row) for row in rows)

    def evaluate(
        self,
        rows: Sequence[PackedRow],
        objective: Objective,
        *,
        on_row: Callable[[int], None] = lambda number: None,
    ) -> StepOutcome:
        """Loss and totals without gradients; ``on_row`` is called with the number of rows done."""
        objective, count = self._prepare(rows, objective, empty="no validation row counts")
        sums = Sums()
        for number, (row, scores) in enumerate(zip(rows, self.scores(rows), strict=True), start=1):
            terms = objective.terms(scores, row)
            sums.add(terms.loss.sum, terms.totals, row)
            on_row(number)
        return self._result(sums, count, rows)

    def grad_norm(self) -> float:
        """Euclidean norm of all gradients together."""
        grads = [p.grad for p in self.trainable.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


def add_totals(into: dict[str, tuple[float, float]], more: Totals) -> None:
    for name, (total, count) in more.items():
        old_total, old_count = into.get(name, (0.0, 0.0))
        into[name] = (old_total + total, old_count + count)
