"""Layers for CPU inference: weights reordered once for oneDNN, q/k/v in one product, norms prepared.

Two reasons. Speed: torch's default product reorders the weights again at every call. Sameness: a row's result
does not depend on how many rows there are (tests/inference/test_packed_linear.py, under every instruction set
of the machine), so a request's tokens are the same in any batch. With two or more rows oneDNN keeps that by
itself, so a lone row is computed as one of several, which costs no time: the product waits for the weights.
In bfloat16 with AMX it picks another order of sums by the number of rows; there every product has the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron4.model.adapters import BottleneckLinear
from nemotron4.model.attention import Attention, Rotation
from nemotron4.model.layers import LayerNorm1P, SquaredReluMLP, SwiGluMLP
from nemotron4.model.transformer import Block, Transformer

LONE_ROW_COPIES = 4  # the number of rows for which oneDNN reads weights fastest
AMX_ROWS = 32  # rows of every product in bfloat16 with AMX: two tiles of 16, the most that one block takes


class PackedLinear(nn.Module):
    """``x W^T + b`` with W stored in oneDNN's blocked order; several layers side by side if asked."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        weights: list[Tensor] = [layer.weight.detach() for layer in layers]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self.out_features = weight.shape[0]
        self.bias = torch.cat(biases).detach() if biases else None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._has_fixed_rows = weight.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            return self.forward(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)
        if self._has_fixed_rows:
            return self._by_equal_rows(x)
        if x.shape[0] == 1:
            return self._product(x.expand(LONE_ROW_COPIES, -1).contiguous())[:1]
        return self._product(x)

    def _by_equal_rows(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -num_rows % AMX_ROWS))
        return torch.cat([self._product(part) for part in torch.split(padded, AMX_ROWS)])[:num_rows]

    def _product(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


class PackedBottleneckLinear(nn.Module):
    """A linear layer with its bottleneck adapter: y + U silu(D LN(y)) of the layer's own y."""

    def __init__(self, layer: BottleneckLinear) -> None:
        super().__init__()
        self.base = PackedLinear(layer)
        self.norm = layer.adapter_norm
        self.down = PackedLinear(layer.adapter_down)
        self.up = PackedLinear(layer.adapter_up)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        out: Tensor = y + self.up(F.silu(self.down(self.norm(y))))
        return out


def packed(layer: nn.Linear) -> nn.Module:
    return PackedBottleneckLinear(layer) if isinstance(layer, BottleneckLinear) else PackedLinear(layer)


class PackedAttention(Attention):
    """Attention whose three input projections are one product, and whose rotations are one."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)  # Attention's own projections are not built
        self.layer = attention.layer
        self.head_dim = attention.head_dim
        num_q, num_kv = (p.out_features // self.head_dim for p in (attention.q_proj, attention.k_proj))
        self._rotated_and_not = (num_q + num_kv, num_kv)
        self._q_and_k = (num_q, num_kv)
        self.qkv_proj = PackedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.packed_o_proj = packed(attention.o_proj)

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        qkv: Tensor = self.qkv_proj(x)
        qk, v = qkv.view(*x.shape[:-1], -1, self.head_dim).split_with_sizes(self._rotated_and_not, -2)
        q, k = rotation.apply(qk).split_with_sizes(self._q_and_k, -2)
        return q, k, v

    def combine(self, heads: Tensor) -> Tensor:
        out: Tensor = self.packed_o_proj(heads)
        return out


class FrozenLayerNorm(nn.Module):
    """LayerNorm1P with gamma computed once, in float32."""

    def __init__(self, norm: LayerNorm1P) -> None:
        super().__init__()
        self._gamma_D = norm.weight.detach().float() + 1
        self._bias_D = norm.bias.detach().float()
        self._shape = tuple(norm.weight.shape)
        self._eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return torch.layer_norm(x, self._shape, self._gamma_D, self._bias_D, self._eps)
        return torch.layer_norm(x.float(), self._shape, self._gamma_D, self._bias_D, self._eps).to(x.dtype)


class PackedSquaredReluMLP(nn.Module):
    def __init__(self, mlp: SquaredReluMLP) -> None:
        super().__init__()
        self.up_proj = PackedLinear(mlp.up_proj)
        self.down_proj = packed(mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.relu_(self.up_proj(x)).square_())
        return out


class PackedSwiGluMLP(nn.Module):
    """SwiGLU whose gate and up projections are one product."""

    def __init__(self, mlp: SwiGluMLP) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(mlp.gate_proj, mlp.up_proj)
        self.down_proj = packed(mlp.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate).mul_(up))
        return out


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN has the product for these weights on this machine."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def pack(model: Transformer) -> None:
    """Replace every linear layer in place. The model can generate afterwards, but not train or be saved.

    Each plain weight is freed as soon as its packed copy is made, so memory grows by one layer at most.
    """
    for block in model.model.blocks():
        pack_block(block)
    pack_output_layer(model)


def pack_block(block: Block) -> None:
    block.self_attn = PackedAttention(block.self_attn)
    block.set_part("mlp", _packed_mlp(block.mlp))
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = getattr(block, name)
        if isinstance(norm, LayerNorm1P):
            block.set_part(name, FrozenLayerNorm(norm))


def pack_output_layer(model: Transformer) -> None:
    model.set_output_layer(PackedLinear(model.lm_head))


def _packed_mlp(mlp: nn.Module) -> nn.Module:
    if isinstance(mlp, SwiGluMLP):
        return PackedSwiGluMLP(mlp)
    assert isinstance(mlp, SquaredReluMLP)
    return PackedSquaredReluMLP(mlp)
