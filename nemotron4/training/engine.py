"""Gradients of one step, and the law that makes them independent of how the step was cut.

The counts of all rows of all processes are added first; each row's loss sum is divided by that one number
before its backward pass. So neither rows, accumulation, packing nor processes change the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemotron4.errors import TrainingError
from nemotron4.model.adapters import adapted_modules
from nemotron4.training.packing import PackedRow, Sample, pack, plan_rows
from nemotron4.training.scorer import Scorer
from nemotron4.training.stages.interface import Stage, Totals


@dataclass(frozen=True)
class StepResult:
    """What one step's forward and backward passes found; the gradients are on the parameters."""

    loss: float
    totals: Totals
    num_tokens: int


class Engine:
    """One process on one device. Subclasses split the same work over several."""

    def __init__(self, scorer: Scorer, *, device: torch.device | str = "cpu") -> None:
        self.scorer = scorer
        self.device = torch.device(device)

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by the model's own names; a tied weight once."""
        return {name: p for name, p in self.scorer.net.named_parameters() if p.requires_grad}

    @property
    def has_adapters(self) -> bool:
        return bool(adapted_modules(self.scorer.net))

    def rows(self, samples: Sequence[Sample], row_tokens: int) -> list[PackedRow]:
        """This process's share of a step, packed."""
        plan = plan_rows([sample.num_tokens for sample in samples], row_tokens)
        return [pack([samples[i] for i in row]).to(self.device) for row in plan]

    def add_up(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes that hold different rows."""
        return list(values)

    def forward_backward(self, rows: Sequence[PackedRow], stage: Stage) -> StepResult:
        """Add the gradients of ``sum of losses / sum of counts`` to the parameters."""
        stage = stage.prepare(rows, self.score, self.add_up)
        (count,) = self.add_up([sum(stage.count(row) for row in rows)])
        if count == 0:
            raise TrainingError("no row of the step trains anything", hint="see nemotron4 doctor data")
        total = 0.0
        totals: dict[str, tuple[float, float]] = {}
        for row in rows:
            terms = stage.terms(self.scorer(row), row)
            refuse_non_finite(terms.loss.sum, row)
            torch.autograd.backward(self._scaled_for_backward(terms.loss.sum / count))
            total += float(terms.loss.sum.detach())
            add_totals(totals, terms.totals)
        return self._result(total, count, totals, sum(len(row.tokens_N) - row.num_padding for row in rows))

    def _scaled_for_backward(self, loss: Tensor) -> Tensor:
        return loss

    def _result(self, total: float, count: float, totals: Totals, num_tokens: int) -> StepResult:
        names = sorted(totals)  # a stage reports the same names for every row, so processes agree on them
        flat = [x for name in names for x in totals[name]]
        loss, tokens, *rest = self.add_up([total, float(num_tokens), *flat])
        added = {name: (rest[2 * i], rest[2 * i + 1]) for i, name in enumerate(names)}
        return StepResult(loss / count, added, int(tokens))

    @torch.no_grad()
    def score(self, row: PackedRow) -> Tensor:
        """A row's scores without gradients, in evaluation mode."""
        was_training = self.scorer.training
        self.scorer.eval()
        scores: Tensor = self.scorer(row)
        self.scorer.train(was_training)
        return scores

    def evaluate(self, rows: Sequence[PackedRow], stage: Stage) -> StepResult:
        """Loss and totals without gradients."""
        stage = stage.prepare(rows, self.score, self.add_up)
        (count,) = self.add_up([sum(stage.count(row) for row in rows)])
        total = 0.0
        totals: dict[str, tuple[float, float]] = {}
        for row in rows:
            terms = stage.terms(self.score(row), row)
            total += float(terms.loss.sum)
            add_totals(totals, terms.totals)
        if count == 0:
            raise TrainingError("no validation row counts", hint="see nemotron4 doctor data")
        return self._result(total, count, totals, sum(len(row.tokens_N) - row.num_padding for row in rows))

    def grad_norm(self) -> float:
        """Euclidean norm of all gradients together."""
        grads = [p.grad for p in self.trainable.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))


def add_totals(into: dict[str, tuple[float, float]], more: Totals) -> None:
    for name, (total, count) in more.items():
        old_total, old_count = into.get(name, (0.0, 0.0))
        into[name] = (old_total + total, old_count + count)


def refuse_non_finite(loss: Tensor, row: PackedRow) -> None:
    """Stop before the update, and say which rows of the data were in the batch."""
    if not torch.isfinite(loss):
        where = ", ".join(sample.where for sample in row.samples[:8] if sample.where) or "unknown rows"
        raise TrainingError(
            f"the loss is {float(loss.detach())} on a packed row of {len(row.samples)} samples: {where}",
            hint="no update was made; look at these rows, or lower optimizer.learning_rate",
        )
