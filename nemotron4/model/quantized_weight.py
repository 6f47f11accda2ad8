"""A frozen weight of eight or four bits: what LoRA is trained on where the whole one does not fit (QLoRA).

Groups of 32 columns: eight bits are ``scale * code`` with codes -127 to 127, four bits are ``least + scale *
code`` with codes 0 to 15, two in a byte; scales and least values are float16. The weight exists whole for
the time of one product, in the type of the computation. Dettmers et al. 2023 have a 4-bit type of their own.

Legend: R output rows, K input columns, G groups of a row.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32
Bits = Literal[8, 4]


class CodedWeight(nn.Module):
    """The codes of a weight of that shape; filled by ``put``."""

    codes: Tensor
    scales_RG: Tensor
    least_RG: Tensor

    def __init__(self, num_rows: int, num_columns: int, bits: Bits) -> None:
        super().__init__()
        self.shape = (num_rows, num_columns)
        self.bits = bits
        num_groups = -(-num_columns // GROUP)
        kind = torch.int8 if bits == 8 else torch.uint8
        self.register_buffer("codes", torch.empty(num_rows, num_groups * GROUP * bits // 8, dtype=kind))
        self.register_buffer("scales_RG", torch.empty(num_rows, num_groups, dtype=torch.float16))
        groups_of_least = num_groups if bits == 4 else 0
        self.register_buffer("least_RG", torch.empty(num_rows, groups_of_least, dtype=torch.float16))

    @torch.no_grad()
    def put(self, start: int, rows_RK: Tensor) -> None:
        """Quantise these rows of the weight."""
        stop = start + len(rows_RK)
        padding = -self.shape[1] % GROUP
        groups_RGC = F.pad(rows_RK.float(), (0, padding)).view(len(rows_RK), -1, GROUP)
        if self.bits == 8:
            scale_RG = (groups_RGC.abs().amax(-1) / 127).half()
            codes = groups_RGC / scale_RG.float().clamp(min=1e-12)[..., None]
            self.codes[start:stop] = codes.round().clamp(-127, 127).to(torch.int8).flatten(1)
        else:
            least_RG = groups_RGC.amin(-1).half()
            scale_RG = ((groups_RGC.amax(-1) - least_RG.float()) / 15).half()
            codes = (groups_RGC - least_RG.float()[..., None]) / scale_RG.float().clamp(min=1e-12)[..., None]
            whole = codes.round().clamp(0, 15).to(torch.uint8).flatten(1)
            self.codes[start:stop] = whole[:, ::2] | whole[:, 1::2] << 4
            self.least_RG[start:stop] = least_RG
        self.scales_RG[start:stop] = scale_RG

    def whole(self, dtype: torch.dtype) -> Tensor:
        """(R, K), in memory of its own."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1)
        groups_RGC = codes.reshape(len(codes), -1, GROUP).to(dtype) * self.scales_RG.to(dtype)[..., None]
        if self.bits == 4:
            groups_RGC += self.least_RG.to(dtype)[..., None]
        return groups_RGC.flatten(1)[:, : self.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        """x W^T."""
        out: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return out


class _Product(torch.autograd.Function):
    """Keeps the codes alone: the backward pass makes the weight again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: CodedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.whole(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.whole(grad.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen linear layer."""

    def __init__(self, base: nn.Linear, bits: Bits) -> None:
        super().__init__()
        with torch.device(base.weight.device):
            self.quantized = CodedWeight(base.out_features, base.in_features, bits)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.quantized(x)
        return y if self.bias is None else y + self.bias


def quantized_weights(model: nn.Module) -> dict[str, CodedWeight]:
    """Every quantised weight by the name that the whole one has."""
    return {
        f"{name.removesuffix('.quantized')}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, CodedWeight)
    }
