"""Rotary positions and grouped-query attention.

Shape suffixes: B = sequences, T = positions, N = rows of any leading dims (``BT`` or packed tokens),
H = query heads, K = key/value heads, E = head dim, R = rotated dims / 2, D = hidden size, S = keys.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron4.model.causal_attention import causal_attention
from nemotron4.model.config import ModelConfig
from nemotron4.model.rotary import rotary_factor, rotary_frequencies


class Rotation:
    """The angles of one forward pass: cos twice and (-sin, sin), each (..., 1, 2R)."""

    def __init__(self, angles_R: Tensor, dtype: torch.dtype, *, factor: float = 1.0) -> None:
        cos, sin = angles_R.cos(), angles_R.sin()
        if factor != 1.0:  # the numbers of every other model stay what they are
            cos, sin = cos * factor, sin * factor
        cos, sin = cos.to(dtype), sin.to(dtype)
        self.cos = torch.cat((cos, cos), dim=-1)
        self.sin = torch.cat((-sin, sin), dim=-1)
        self.num_rotated = self.cos.shape[-1]

    def apply(self, x: Tensor) -> Tensor:
        """Rotate the first 2R dims of each head; the pairs are (i, i + R), the rest passes through."""
        if x.shape[-1] == self.num_rotated:
            return self._rotate(x)
        rotated, rest = torch.split(x, [self.num_rotated, x.shape[-1] - self.num_rotated], dim=-1)
        return torch.cat((self._rotate(rotated), rest), dim=-1)

    def _rotate(self, x: Tensor) -> Tensor:
        # Rolling by R swaps the two halves.
        return torch.addcmul(x * self.cos, x.roll(self.num_rotated // 2, -1), self.sin)


class RotaryEmbedding(nn.Module):
    """RoPE in rotate-half form: ``inv_freq_i = theta^(-2i / rotary_dim)``, angles in float32."""

    inv_freq_R: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq_R", torch.from_numpy(rotary_frequencies(config)), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angles = positions.float()[..., None, None] * self.inv_freq_R
        return Rotation(angles, dtype, factor=rotary_factor(self.config))


class Attend(Protocol):
    """How queries meet keys and values: a full causal pass, or one through a cache."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(..., H, E), (..., K, E), (..., K, E) -> (..., H, E); softmax(q k / sqrt(E)) v."""
        ...


class CausalAttend:
    """Each position sees itself and what is before it, within its own segment.

    ``segments_BT`` numbers the documents of packed rows; padding is a segment of its own.
    """

    def __init__(self, segments_BT: Tensor | None = None) -> None:
        self._mask_B1TT: Tensor | None = None
        if segments_BT is not None:
            same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
            self._mask_B1TT = same_BTT.tril()[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._mask_B1TT is None:
            return causal_attention(q, k, v)
        q_BHTE, k_BKTE, v_BKTE = (x.transpose(1, 2) for x in (q, k, v))
        out_BHTE = F.scaled_dot_product_attention(
            q_BHTE, k_BKTE, v_BKTE, attn_mask=self._mask_B1TT, enable_gqa=q.shape[-2] != k.shape[-2]
        )
        return out_BHTE.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention: query head j reads key/value head ``j // (H / K)``."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.layer = layer
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(hidden, q_size, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden, bias=bias)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        heads = attend(self.layer, *self.project(x, rotation))
        return self.combine(heads.flatten(-2))

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (..., H, E), rotated keys (..., K, E) and values (..., K, E)."""
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_dim) for part in parts)
        return rotation.apply(q), rotation.apply(k), v

    def combine(self, heads: Tensor) -> Tensor:
        """(..., H * E) -> (..., D)."""
        out: Tensor = self.o_proj(heads)
        return out
