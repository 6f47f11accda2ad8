"""Computing in 16 bits with float32 weights in one process; over several, FSDP2 does the same (``sharded``).

As Micikevicius et al., "Mixed Precision Training" (2018), section 3.1: products take 16-bit copies of the
weights, gradients are added up in float32, and the optimiser sees float32 alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nemotron4.training.scorer import Scorer, heads


class NarrowCopies:
    """Copies of a scorer's float32 weights in ``dtype``, put in their place for a forward and backward pass.

    A reward head keeps its own weights.
    """

    def __init__(self, scorer: Scorer, dtype: torch.dtype) -> None:
        kept = {parameter for head in heads(scorer) for parameter in head.parameters()}
        self._copies: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in scorer.parameters():
            if parameter.dtype == torch.float32 and parameter not in kept:
                copy = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
                if copy.requires_grad:
                    copy.register_post_accumulate_grad_hook(_GradientMover(parameter))  # type: ignore[no-untyped-call]
                self._copies[parameter] = copy
        self._places = [
            (owner, name, parameter)
            for owner in scorer.modules()
            for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False)
            if parameter in self._copies
        ]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The scorer computes with the copies, brought up to date first; gradients go to its own weights."""
        # Always: a fused optimiser leaves no trace that it wrote.
        with torch.no_grad():
            for parameter, copy in self._copies.items():
                copy.copy_(parameter)
        try:
            for owner, name, parameter in self._places:
                setattr(owner, name, self._copies[parameter])
            yield
        finally:
            for owner, name, parameter in self._places:
                setattr(owner, name, parameter)


class _GradientMover:
    """Adds the gradient of a copy to its weight's and leaves the copy none."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter

    def __call__(self, copy: Tensor) -> Any:
        assert copy.grad is not None
        if self._parameter.grad is None:
            self._parameter.grad = copy.grad.to(self._parameter.dtype)
        else:
            self._parameter.grad.add_(copy.grad)
        copy.grad = None
