"""What a step costs in operations, and how fast this machine multiplies: the two sides of MFU."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from nemotron4.model.config import ModelConfig
from nemotron4.training.packing import Sample


@dataclass(frozen=True)
class StepCost:
    """Operations that a step needs, however it is packed; what is computed twice counts once.

    Two for each weight of the blocks and token, two for each weight of the output layer and trained token,
    and ``2 * length^2`` for each layer's heads (causal attention). The backward pass costs twice the forward
    pass; once, where only an adapter trains and most weights have no gradient.
    """

    block_weights: int
    output_weights: int
    attention_width: int  # heads x head dimension x layers
    num_passes: int

    @classmethod
    def of(cls, config: ModelConfig, *, has_adapter: bool) -> StepCost:
        output = config.vocab_size * config.hidden_size
        is_reward = bool(config.num_reward_attributes)
        matrices = 1 if is_reward or config.tie_embeddings else 2
        return cls(
            block_weights=config.num_parameters - matrices * output,
            output_weights=0 if is_reward else output,
            attention_width=config.num_heads * config.head_dim * config.num_layers,
            num_passes=2 if has_adapter else 3,
        )

    def flops(self, samples: Sequence[Sample]) -> float:
        """Operations of one step on these samples."""
        forward = 0.0
        for sample in samples:
            for segment in sample.segments:
                length = len(segment.tokens)
                forward += 2.0 * self.block_weights * length
                forward += 2.0 * self.output_weights * segment.num_trained
                forward += 2.0 * self.attention_width * length * length
        return self.num_passes * forward


@cache
def matmul_flops_per_s(device: torch.device | str = "cpu", size: int = 1024, rounds: int = 25) -> float:
    """The best of many float32 matrix products: what MFU and estimates are measured against.

    Measured once in a process.
    """
    x = torch.ones(size, size, device=device)
    best = 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        x @ x
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was held so far: of the GPU's memory, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
