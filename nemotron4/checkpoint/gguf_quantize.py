"""Values into GGUF's K-quants, after llama.cpp's reference quantiser (ggml-quants.c, no importance matrix).

Q8_0, Q4_0 and Q5_0 are the ``gguf`` package's, which are llama.cpp's bit for bit. Q4_K and Q6_K are here: the
same search over scales, for all blocks at once. Sums of floats are taken in another order than in C, so a
candidate that ties within rounding may win there and lose here.

Legend: S = super-blocks of 256 values, J = sub-blocks, N = values of a sub-block, R = rows, X = bytes.
"""

from __future__ import annotations

from pathlib import Path

import gguf.quants
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from nemotron4.checkpoint.gguf_file import Array, GgufTensor, dequantize

Kind = GGMLQuantizationType
VALUES_PER_STEP = 1 << 18
EPS = 1e-15
# What llama.cpp stores rows in that are no multiple of 256.
FALLBACKS = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}


def kind_for(kind: GGMLQuantizationType, num_columns: int) -> GGMLQuantizationType:
    """The type itself where its blocks fill the rows, else llama.cpp's replacement, else F16."""
    for candidate in (kind, FALLBACKS.get(kind, Kind.F16)):
        if num_columns % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Kind.F16


def quantize_blocks(rows_RC: Tensor, kind: GGMLQuantizationType) -> tuple[Array, Tensor]:
    """The stored bytes [R, X] of float32 rows, and what they mean."""
    values_RC = rows_RC.float().contiguous()
    if kind in (Kind.Q4_K, Kind.Q6_K):
        pack = _q4_k if kind is Kind.Q4_K else _q6_k
        flat_SN = values_RC.view(-1, 256)
        step = VALUES_PER_STEP // 256
        parts = [pack(flat_SN[start : start + step]) for start in range(0, len(flat_SN), step)]
        data = torch.cat(parts).view(len(values_RC), -1).numpy()
    else:
        data = gguf.quants.quantize(values_RC.numpy(), kind)
    stored = GgufTensor("", tuple(values_RC.shape), kind, 0, data.size, Path())
    return data, dequantize(torch.from_numpy(np.ascontiguousarray(data).reshape(-1)), stored, torch.float32)


def _with_minimum(x_SJN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, minimum (negated) and values 0..15 of each sub-block (``make_qkx2_quants``)."""
    rms = x_SJN.square().mean(2, keepdim=True).sqrt()
    weight = rms + x_SJN.abs()
    low = x_SJN.amin(2, keepdim=True).clamp_(max=0)
    top = x_SJN.amax(2, keepdim=True)
    span = top - low
    is_flat = span == 0
    span = torch.where(is_flat, 1.0, span)
    sum_w, sum_x = weight.sum(2, keepdim=True), (weight * x_SJN).sum(2, keepdim=True)
    scale, minimum = span / 15, low.clone()
    values = ((x_SJN - low) * (15 / span)).round_().clamp_(0, 15)
    best = (weight * (scale * values + low - x_SJN).square_()).sum(2, keepdim=True)
    for step in range(21):
        # From the best minimum so far, as there.
        span = torch.where(is_flat, 1.0, top - minimum)
        tried = ((x_SJN - minimum) * ((-1 + 0.1 * step + 15) / span)).round_().clamp_(0, 15)
        weighted = weight * tried
        sum_l, sum_l2 = weighted.sum(2, keepdim=True), (weighted * tried).sum(2, keepdim=True)
        sum_xl = (weighted * x_SJN).sum(2, keepdim=True)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        safe = torch.where(determinant > 0, determinant, 1.0)
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / safe
        new_min = (sum_l2 * sum_x - sum_l * sum_xl) / safe
        above = new_min > 0
        new_scale = torch.where(above, sum_xl / torch.where(sum_l2 > 0, sum_l2, 1.0), new_scale)
        new_min = torch.where(above, 0.0, new_min)
        error = (weight * (new_scale * tried + new_min - x_SJN).square_()).sum(2, keepdim=True)
        is_better = (determinant > 0) & (error < best)
        best = torch.where(is_better, error, best)
        scale, minimum = torch.where(is_better, new_scale, scale), torch.where(is_better, new_min, minimum)
        values = torch.where(is_better, tried, values)
    scale = torch.where(is_flat, 0.0, scale)
    return scale.squeeze(2), -minimum.squeeze(2), torch.where(is_flat, 0.0, values)


def _half(values: Tensor) -> Tensor:
    """[S, 1] -> bytes of float16, [S, 2]."""
    return values.to(torch.float16).contiguous().view(torch.uint8)


def _q4_k(x_SN: Tensor) -> Tensor:
    """2 bytes d, 2 bytes dmin, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles."""
    x_SJN = x_SN.view(-1, 8, 32)
    scale_SJ, min_SJ, values_SJN = _with_minimum(x_SJN)
    largest_scale, largest_min = scale_SJ.amax(1, keepdim=True), min_SJ.amax(1, keepdim=True)

    def in_6_bits(part_SJ: Tensor, largest: Tensor) -> Tensor:
        inverse = torch.where(largest > 0, 63 / largest, 0.0)
        return (part_SJ * inverse).round_().clamp_(0, 63).to(torch.uint8)

    scales, minima = in_6_bits(scale_SJ, largest_scale), in_6_bits(min_SJ, largest_min)
    d, d_min = (largest_scale / 63).half(), (largest_min / 63).half()
    step = (d.float() * scales)[..., None]
    offset = (d_min.float() * minima)[..., None]
    rounded = ((x_SJN + offset) / torch.where(step == 0, 1.0, step)).round_().clamp_(0, 15)
    codes = torch.where(step == 0, values_SJN, rounded).to(torch.uint8)
    low = torch.cat((scales[:, :4] | (scales[:, 4:] >> 4 << 6), minima[:, :4] | (minima[:, 4:] >> 4 << 6)), 1)
    high = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    pairs = codes.view(-1, 4, 2, 32)
    nibbles = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)
    return torch.cat((_half(d), _half(d_min), low, high, nibbles), 1)


def _with_sign(x_SJN: Tensor) -> Tensor:
    """Scale of each sub-block of values -32..31 (``make_qx_quants``, weights x squared)."""
    at = x_SJN.abs().argmax(2, keepdim=True)
    largest = x_SJN.gather(2, at)
    is_zero = largest.abs() < EPS
    safe = torch.where(is_zero, 1.0, largest)
    weight = x_SJN.square()

    def sums(inverse: Tensor) -> tuple[Tensor, Tensor]:
        values = (x_SJN * inverse).round_().clamp_(-32, 31)
        return (weight * x_SJN * values).sum(2, True), (weight * values.square()).sum(2, True)

    sum_xl, sum_l2 = sums(-32 / safe)
    scale = torch.where(sum_l2 > 0, sum_xl / torch.where(sum_l2 > 0, sum_l2, 1.0), 0.0)
    best = scale * sum_xl
    for step in (*range(-9, 0), *range(1, 10)):
        sum_xl, sum_l2 = sums(-(32 + 0.1 * step) / safe)
        is_better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        scale = torch.where(is_better, sum_xl / torch.where(sum_l2 > 0, sum_l2, 1.0), scale)
        best = torch.where(is_better, scale * sum_xl, best)
    return torch.where(is_zero, 0.0, scale).squeeze(2)


def _q6_k(x_SN: Tensor) -> Tensor:
    """128 bytes of low nibbles, 64 of high pairs, 16 signed scales, 2 bytes d."""
    x_SJN = x_SN.view(-1, 16, 16)
    scale_SJ = _with_sign(x_SJN)
    at = scale_SJ.abs().argmax(1, keepdim=True)
    largest = scale_SJ.gather(1, at)
    is_zero = largest.abs() < EPS
    inverse = -128 / torch.where(is_zero, 1.0, largest)
    d = torch.where(is_zero, 0.0, 1 / inverse).half()
    scales = (scale_SJ * inverse).round_().clamp_(-128, 127)
    scales = torch.where(is_zero, 0.0, scales)
    step = (d.float() * scales)[..., None]
    rounded = (x_SJN / torch.where(step == 0, 1.0, step)).round_().clamp_(-32, 31) + 32
    codes = torch.where(step == 0, 32.0, rounded).to(torch.uint8).view(-1, 2, 4, 32)
    low = torch.stack(
        (
            (codes[:, :, 0] & 15) | ((codes[:, :, 2] & 15) << 4),
            (codes[:, :, 1] & 15) | ((codes[:, :, 3] & 15) << 4),
        ),
        2,
    )
    high = sum((codes[:, :, i] >> 4) << 2 * i for i in range(1, 4)) | (codes[:, :, 0] >> 4)
    signed = scales.to(torch.int8).view(torch.uint8)
    return torch.cat((low.flatten(1), torch.as_tensor(high).flatten(1), signed, _half(d)), 1)
