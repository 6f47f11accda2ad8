"""A frozen weight of eight or four bits: what LoRA is trained on where the whole one does not fit (QLoRA).

A row is cut into groups. Of 32 columns, int8 is ``scale * code`` with codes -127 to 127, int4 is ``least +
scale * code`` with codes 0 to 15; of 64, nf4 is ``scale * NF4[code]`` (Dettmers et al. 2023). Two codes of
four bits are in a byte; scales and least values are float16. The weight exists whole for the time of one
product, in the type of the computation.

Legend: R output rows, K input columns, G groups of a row, C columns of a group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron4.model.adapter_config import Codes

GROUP: dict[Codes, int] = {"int8": 32, "int4": 32, "nf4": 64}
# Quantiles of a normal distribution, in units of the group's largest number (the paper's appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


class CodedWeight(nn.Module):
    """The codes of a weight of that shape; filled by ``put``."""

    codes: Tensor
    scales_RG: Tensor
    least_RG: Tensor

    def __init__(self, num_rows: int, num_columns: int, kind: Codes) -> None:
        super().__init__()
        self.shape = (num_rows, num_columns)
        self.kind = kind
        self.group = GROUP[kind]
        num_groups = -(-num_columns // self.group)
        is_byte = kind == "int8"
        width = num_groups * self.group // (1 if is_byte else 2)
        codes = torch.empty(num_rows, width, dtype=torch.int8 if is_byte else torch.uint8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales_RG", torch.empty(num_rows, num_groups, dtype=torch.float16))
        groups_of_least = num_groups if kind == "int4" else 0
        self.register_buffer("least_RG", torch.empty(num_rows, groups_of_least, dtype=torch.float16))

    @torch.no_grad()
    def put(self, start: int, rows_RK: Tensor) -> None:
        """Quantise these rows of the weight."""
        rows = slice(start, start + len(rows_RK))
        padding = -self.shape[1] % self.group
        groups_RGC = F.pad(rows_RK.float(), (0, padding)).view(len(rows_RK), -1, self.group)
        if self.kind == "int4":
            self.least_RG[rows] = groups_RGC.amin(-1)
            groups_RGC = groups_RGC - self.least_RG[rows].float()[..., None]
        largest_RG = groups_RGC.abs().amax(-1)
        self.scales_RG[rows] = largest_RG / {"int8": 127, "int4": 15, "nf4": 1}[self.kind]
        units_RGC = groups_RGC / self.scales_RG[rows].float().clamp(min=1e-12)[..., None]
        if self.kind == "int8":
            self.codes[rows] = units_RGC.round().clamp(-127, 127).to(torch.int8).flatten(1)
            return
        if self.kind == "int4":
            codes = units_RGC.round().clamp(0, 15)
        else:
            values = units_RGC.new_tensor(NF4)
            codes = torch.bucketize(units_RGC, (values[1:] + values[:-1]) / 2)
        whole = codes.to(torch.uint8).flatten(1)
        self.codes[rows] = whole[:, ::2] | whole[:, 1::2] << 4

    def whole(self, dtype: torch.dtype) -> Tensor:
        """(R, K), in memory of its own."""
        codes = self.codes
        if self.kind != "int8":
            codes = torch.stack([codes & 15, codes >> 4], dim=-1)
        if self.kind == "nf4":
            values = torch.tensor(NF4, dtype=dtype, device=codes.device)
            units = values.index_select(0, codes.flatten().int())
        else:
            units = codes.to(dtype)
        groups_RGC = units.reshape(len(codes), -1, self.group) * self.scales_RG.to(dtype)[..., None]
        if self.kind == "int4":
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

    def __init__(self, base: nn.Linear, kind: Codes) -> None:
        super().__init__()
        with torch.device(base.weight.device):
            self.quantized = CodedWeight(base.out_features, base.in_features, kind)
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
