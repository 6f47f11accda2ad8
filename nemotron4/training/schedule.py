"""Learning rate and sample order as pure functions of the step: what a resumed run needs no state for."""

from __future__ import annotations

import math

import torch

from nemotron4.training.recipe import OptimizerSection


def learning_rate(step: int, num_steps: int, settings: OptimizerSection) -> float:
    """The rate of step 0, 1, ..., num_steps - 1.

    Warm-up is linear and never 0: ``(step + 1) / (warmup + 1)`` of the rate (NeMo without constant steps).
    Then ``constant``; ``linear`` or ``cosine`` down to the minimum; or ``steep``, the square-root-shaped fall
    ``1 - sqrt(progress)`` that drops fastest at its start, for continued training.
    """
    peak, low = settings.learning_rate, settings.min_learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / (settings.warmup_steps + 1)
    if settings.schedule == "constant":
        return peak
    progress = min(1.0, (step - settings.warmup_steps) / max(1, num_steps - 1 - settings.warmup_steps))
    shape = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "steep": 1 - math.sqrt(progress),
    }[settings.schedule]
    return low + (peak - low) * shape


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of the samples that depends on seed and epoch only."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(num_samples, generator=generator).tolist()
    return order
