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
        inner = self.up_proj(x)
        # Adapters and hooks (tensor parallelism sets them) take part in the layer's own call.
        down = self.down_proj
        is_plain = type(down) is nn.Linear and not (down._forward_pre_hooks or down._forward_hooks)
        if is_plain and torch.is_grad_enabled():
            out: Tensor = _SquaredReluLinear.apply(inner, down.weight)  # type: ignore[no-untyped-call]
        else:
            out = down(F.relu(inner).square())
        return out


class _SquaredReluLinear(torch.autograd.Function):
    """``W relu(x)^2`` that keeps relu(x) alone for its gradient: a quarter of a block's activations less."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_DF: Tensor) -> Tensor:
        root = F.relu(x)
        ctx.save_for_backward(root, weight_DF)
        return F.linear(root.square(), weight_DF)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        root, weight_DF = ctx.saved_tensors
        grad_x = grad_weight_DF = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight_DF).mul_(root).mul_(2)
        if ctx.needs_input_grad[1]:
            grad_weight_DF = grad.flatten(0, -2).T @ root.square().flatten(0, -2)
        return grad_x, grad_weight_DF


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
