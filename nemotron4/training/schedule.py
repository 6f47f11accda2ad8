"""How long a run is and how its rate goes: functions of recipe and step, so a resumed run needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nemotron4.errors import ConfigError, TrainingError
from nemotron4.training.recipe import OptimizerSection, Recipe


@dataclass(frozen=True)
class Plan:
    """Samples of each step, from the length of the run and the batch ramp, and the steps of warm-up.

    ``notes`` say what was fitted to a short data set; the last ``num_extended`` steps follow the schedule.
    """

    sizes: tuple[int, ...]
    warmup_steps: int
    notes: tuple[str, ...] = ()
    num_extended: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.sizes)

    @property
    def num_scheduled(self) -> int:
        """The steps over which the rate goes from its beginning to its end."""
        return len(self.sizes) - self.num_extended


def plan_steps(recipe: Recipe, num_samples: int) -> Plan:
    """The steps of the run, and those after its schedule."""
    plan = _scheduled(recipe, num_samples)
    more, seen = [], sum(plan.sizes)
    for _ in range(recipe.run.extend):
        more.append(min(recipe.samples_at(seen), max(plan.sizes)))
        seen += more[-1]
    num_steps, result = len(plan.sizes) + len(more), recipe.run.result
    if isinstance(result, int) and result > num_steps:
        raise ConfigError(f"run.result is step {result} of a run of {num_steps} steps")
    return replace(plan, sizes=(*plan.sizes, *more), num_extended=len(more))


def _scheduled(recipe: Recipe, num_samples: int) -> Plan:
    """Step sizes; with epochs the last step may be smaller, which the loss law allows."""
    if num_samples == 0:
        raise TrainingError("no sample to train on", hint="see nemotron4 doctor data")
    sizes: list[int] = []
    notes: list[str] = []
    seen = 0
    warmup = recipe.optimizer.warmup_steps
    if recipe.run.max_steps is not None:
        for _ in range(recipe.run.max_steps):
            sizes.append(recipe.samples_at(seen))
            seen += sizes[-1]
        if max(sizes) > num_samples:
            notes.append(f"a step of {max(sizes)} samples has some of the {num_samples} rows more than once")
        if warmup >= len(sizes):
            notes.append(f"the warm-up of {warmup} steps is as long as the run: the full rate is not reached")
        return Plan(tuple(sizes), warmup, tuple(notes))
    total = num_samples * (recipe.run.epochs or 1)
    while seen < total:
        sizes.append(min(recipe.samples_at(seen), num_samples, total - seen))
        seen += sizes[-1]
    if recipe.samples_at(0) > num_samples:
        notes.append(f"a step has {num_samples} samples, all there are; batch.global_size asks for more")
    if warmup >= len(sizes):
        warmup = len(sizes) // 10
        notes.append(
            f"the warm-up is {warmup} steps of {len(sizes)}; optimizer.warmup_steps is as long as the run"
        )
    return Plan(tuple(sizes), warmup, tuple(notes))


def learning_rate(step: int, num_steps: int, settings: OptimizerSection) -> float:
    """The rate of step 0, 1, ..., num_steps - 1; after them it stays.

    Warm-up is linear and never 0: ``(step + 1) / (warmup + 1)`` of the rate (NeMo without constant steps).
    Then ``constant``; ``linear`` or ``cosine`` down to the minimum; ``wsd``, constant with a linear fall in
    the last ``decay_steps``, so that a longer run repeats only those; or ``steep``, the square-root-shaped
    fall ``1 - sqrt(progress)`` that drops fastest at its start, for continued training.
    """
    peak, low = settings.learning_rate, settings.min_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "wsd":
        left = num_steps - 1 - step
        share = min(1.0, max(0, left) / settings.decay_steps)
        return low + (peak - low) * share
    progress = min(1.0, (step - settings.warmup_steps) / max(1, num_steps - 1 - settings.warmup_steps))
    shape = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "steep": 1 - math.sqrt(progress),
    }[settings.schedule]
    return low + (peak - low) * shape
