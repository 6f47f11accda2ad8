"""Weights in fewer bits, as the ``compressed-tensors`` layout keeps them.

int8: symmetric, a scale for each output row, max|w| / 127. fp8: E4M3, max|w| / 448. Activations are quantised
by the engine, per token. The scale is rounded to its stored type first, so that what is written is what is
meant. Legend: R = output rows, C = input columns.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

Scheme = Literal["int8", "fp8"]

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0}
FORMATS = {"int8": "int-quantized", "fp8": "float-quantized"}


class Quantized(NamedTuple):
    """Eight-bit values [R, C] and their scales [R, 1]."""

    values_RC: torch.Tensor
    scale_R1: torch.Tensor


def quantize_rows(weight_RC: torch.Tensor, scheme: Scheme, *, scale_dtype: torch.dtype) -> Quantized:
    """Quantise in float32. A row of zeros has scale 1."""
    weight_RC = weight_RC.float()
    largest_R1 = torch.linalg.vector_norm(weight_RC, torch.inf, dim=1, keepdim=True)
    scale_R1 = torch.where(largest_R1 > 0, largest_R1 / LARGEST[scheme], 1.0).to(scale_dtype)
    # A scale below the smallest number of its type would divide by zero.
    scale_R1 = scale_R1.clamp(min=torch.finfo(scale_dtype).tiny)
    scaled_RC = weight_RC / scale_R1.float()
    scaled_RC = scaled_RC.clamp_(-LARGEST[scheme], LARGEST[scheme])
    if scheme == "int8":
        scaled_RC = scaled_RC.round_()
    return Quantized(scaled_RC.to(STORED[scheme]), scale_R1)


class ErrorSum:
    """Relative error of a tensor seen in blocks: ||w - w'|| / ||w|| and the largest |w - w'|."""

    def __init__(self) -> None:
        self._error = self._weight = self._largest = 0.0

    def add(self, weight_RC: torch.Tensor, quantized: Quantized) -> None:
        weight_RC = weight_RC.float()
        error_RC = quantized.values_RC.float().mul_(quantized.scale_R1.float()).sub_(weight_RC)
        self._error += _sum_of_squares(error_RC)
        self._weight += _sum_of_squares(weight_RC)
        least, most = error_RC.aminmax()
        self._largest = max(self._largest, -float(least), float(most))

    def to_json(self) -> dict[str, float]:
        relative = (self._error / self._weight) ** 0.5 if self._weight else 0.0
        return {"relative_error": relative, "largest_error": self._largest}


def _sum_of_squares(values_RC: torch.Tensor) -> float:
    """In float32 within a row, in float64 over the rows; without a copy of the values."""
    return float(torch.linalg.vector_norm(values_RC, dim=1).double().square().sum())


def quantization_config(scheme: Scheme, *, ignored: list[str]) -> dict[str, Any]:
    """The entry of ``config.json`` that transformers and vLLM read."""
    kind = {"num_bits": 8, "type": "int" if scheme == "int8" else "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[scheme],
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": kind | {"strategy": "channel", "dynamic": False},
                "input_activations": kind | {"strategy": "token", "dynamic": True},
            }
        },
    }
