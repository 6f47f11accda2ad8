"""Norms and feed-forward blocks of the two families.

Shape suffixes: D = hidden size, F = feed-forward size; ``...`` = any leading dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron4.model.config import ModelConfig


class LayerNorm1P(nn.Module):
    """LayerNorm with a zero-centred weight: ``normalise(x) * (1 + weight) + bias``.

    The stored weight is gamma - 1. The 1 is added in float32, as Transformer Engine does: in bfloat16
    ``weight + 1`` would round gamma to steps of 2^-7. Statistics are float32 too.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        gamma_D = self.weight.float() + 1
        return F.layer_norm(x.float(), gamma_D.shape, gamma_D, self.bias.float(), self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``; the division is float32, the weight is applied in the input's type."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class SquaredReluMLP(nn.Module):
    """Nemotron-4: ``W_down relu(W_up x)^2``, no gate, no bias."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and _is_plain(self.up_proj) and _is_plain(self.down_proj):
            out: Tensor = _SquaredRelu.apply(  # type: ignore[no-untyped-call]
                x, self.up_proj.weight, self.down_proj.weight
            )
        else:
            out = self.down_proj(F.relu(self.up_proj(x)).square())
        return out


def _is_plain(layer: nn.Module) -> bool:
    """Adapters and hooks (tensor parallelism sets them) take part in a layer's own call."""
    return type(layer) is nn.Linear and not (layer._forward_pre_hooks or layer._forward_hooks)


class _SquaredRelu(torch.autograd.Function):
    """The block with one of its wide tensors kept, relu(W_up x), and two in memory, where torch has three.

    A second backward pass through the same graph is an error: the first one overwrites what was kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        root = F.linear(x, up_FD).relu_()
        ctx.save_for_backward(x, root, up_FD, down_DF)
        return F.linear(root.square(), down_DF)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, root, up_FD, down_DF = ctx.saved_tensors
        needs_x, needs_up, needs_down = ctx.needs_input_grad
        grad_x = grad_up_FD = grad_down_DF = None
        if needs_x or needs_up:
            grad_inner = ((2 * grad) @ down_DF).mul_(root)
        if needs_down:
            grad_down_DF = grad.flatten(0, -2).T @ root.square_().flatten(0, -2)
        if needs_up:
            grad_up_FD = grad_inner.flatten(0, -2).T @ x.flatten(0, -2)
        if needs_x:
            grad_x = grad_inner @ up_FD
        return grad_x, grad_up_FD, grad_down_DF


class SwiGluMLP(nn.Module):
    """Llama: ``W_down (silu(W_gate x) * W_up x)``, no bias."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def build_norm(config: ModelConfig) -> nn.Module:
    kind = LayerNorm1P if config.norm == "layernorm1p" else RMSNorm
    return kind(config.hidden_size, config.norm_eps)


def build_mlp(config: ModelConfig) -> SquaredReluMLP | SwiGluMLP:
    kind = SquaredReluMLP if config.mlp == "relu2" else SwiGluMLP
    return kind(config.hidden_size, config.ffn_hidden_size)
