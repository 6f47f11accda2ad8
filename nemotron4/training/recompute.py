"""Activation checkpointing: a block keeps its input alone and computes the rest again for the gradient."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemotron4.model.attention import Attend, Rotation
from nemotron4.model.transformer import Block, Decoder


class RecomputedBlock(Block):
    """A block with the parts, and so the weights and their names, of the one it replaces."""

    def __init__(self, base: Block) -> None:
        nn.Module.__init__(self)
        for name, part in base.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        # Random numbers of dropout are drawn again as they were (preserve_rng_state).
        out: Tensor = checkpoint(super().forward, x, rotation, attend, use_reentrant=False)
        return out


def recompute_activations(decoder: Decoder) -> None:
    """Replace every block of the decoder, in place."""
    for layer, block in enumerate(decoder.blocks()):
        decoder.layers[layer] = RecomputedBlock(block)
