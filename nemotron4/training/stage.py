"""What a stage of training is. Each file in ``stages/`` has one as ``STAGE``, and nothing else names it.

A stage owns its table of the recipe, the rows it reads, what they become, its loss, its numbers, and what
``doctor data`` says of its rows. So a new stage is one new file. Ours load PyTorch only to make an objective,
a scorer or a trainer, so that a recipe is checked without it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nemotron4.errors import ConfigError, unknown_name
from nemotron4.training import stages
from nemotron4.training.encoding import RowKind
from nemotron4.training.rollout_settings import RolloutSection

if TYPE_CHECKING:
    from torch import Tensor

    from nemotron4.model.reward_head import RewardModel
    from nemotron4.model.transformer import Transformer
    from nemotron4.training.losses import SumCount
    from nemotron4.training.packing import PackedRow
    from nemotron4.training.scorer import Scorer

# Name -> (sum, count), added over rows and processes. Names that start with "_" are inputs of ``summarise``.
Totals = Mapping[str, tuple[float, float]]
Score = Callable[["PackedRow"], "Tensor"]
AddUp = Callable[[Sequence[float]], list[float]]


@dataclass(frozen=True)
class Terms:
    """One row's share of the step's loss, and numbers worth seeing."""

    loss: SumCount
    totals: Totals = field(default_factory=dict)


class Objective:
    """What is minimised. It holds settings and no state, so any row can be scored anywhere.

    ``has_known_slope``: the loss's derivative to each score is the same, whatever the scores are.
    """

    has_known_slope: ClassVar[bool] = False

    def count(self, row: PackedRow) -> float:
        """The row's share of the divisor, known from the data alone."""
        raise NotImplementedError

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        """Loss and metrics of a row from its scores; ``terms(...).loss.count`` equals ``count(row)``."""
        raise NotImplementedError

    def prepare(self, rows: Sequence[PackedRow], score: Score, add_up: AddUp) -> Objective:
        """The objective for one step, with what must be known of the whole batch first (KTO's baseline).

        ``score`` runs the model without gradients; ``add_up`` adds numbers over all processes.
        """
        return self

    def summarise(self, totals: Totals) -> dict[str, float]:
        """Metrics of a step from its added-up totals."""
        return means(totals)

    def names(self, totals: Totals) -> set[str]:
        """What ``summarise`` may give for totals like these, and the loss."""
        return {"loss", *(name for name in totals if not name.startswith("_"))}


def means(totals: Totals) -> dict[str, float]:
    """Sum over count of every public total; one without a term is left out, not zero."""
    return {
        name: total / count for name, (total, count) in totals.items() if count and not name.startswith("_")
    }


class Stage:
    """A kind of run. ``section`` is the dataclass of its table, which has the stage's name."""

    name: ClassVar[str]
    section: ClassVar[type | None] = None
    needed: ClassVar[str] = ""  # settings without which the table cannot be left out
    kinds: ClassVar[tuple[RowKind, ...]]  # the first is the usual one
    examples: ClassVar[dict[str, dict[str, Any]]]  # for `train --new`: name -> the table to begin with
    has_reward_head: ClassVar[bool] = False
    reads_documents: ClassVar[bool] = False  # rows are texts, cut into windows

    @property
    def table(self) -> str:
        return self.name.replace("-", "_")

    def check(self, recipe: Any) -> None:
        """ConfigError for settings that do not go together."""

    def named(self, table: dict[str, Any], reward_model: str | None) -> dict[str, Any]:
        """The stage's table in a chain whose last reward model is given, for stages that use one."""
        return table

    def kind(self, settings: Any) -> RowKind:
        """What the rows are, unless a source says otherwise."""
        return self.kinds[0]

    def objective(self, settings: Any) -> Objective:
        raise NotImplementedError

    def scorer(self, net: Transformer | RewardModel, settings: Any) -> Scorer:
        from nemotron4.model.reward_head import RewardModel
        from nemotron4.training.scorer import AttributeScorer, LogprobScorer

        return AttributeScorer(net) if isinstance(net, RewardModel) else LogprobScorer(net)

    def has_reference(self, settings: Any) -> bool:
        """True if the rows need log-probabilities under the start before the first step."""
        return False

    def rollouts(self, settings: Any) -> RolloutSection | None:
        """How answers are drawn, in a stage whose rows are prompts."""
        return None

    def num_samples(self, settings: Any) -> int | None:
        """Samples that a step takes from the data, where it is not ``batch.global_size``."""
        rollouts = self.rollouts(settings)
        return None if rollouts is None else rollouts.num_prompts

    def trainer(self, settings: Any) -> Any:
        """What makes the trainer from what ``run.train`` gives it; None for the plain one."""
        return None


def names() -> list[str]:
    """Every stage's name: the files of ``stages/``."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(stages.__path__))


def find(name: str) -> Stage:
    """The stage of a recipe."""
    if name not in names():
        message, hint = unknown_name("stage", name, names())
        raise ConfigError(message, hint=hint)
    module = importlib.import_module(f"{stages.__name__}.{name.replace('-', '_')}")
    found: Stage = module.STAGE
    return found


def all_stages() -> list[Stage]:
    return [find(name) for name in names()]


def kinds() -> dict[str, RowKind]:
    """Every kind of row by its name."""
    found = [kind for each in all_stages() for kind in each.kinds]
    return {kind.name: kind for kind in reversed(found)}
