"""Values of a stored GGUF tensor. The slow, obvious version is ``gguf.quants.dequantize``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import gguf.quants
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nemotron4.checkpoint.gguf_file import GgufTensor
from nemotron4.errors import CheckpointError

# N = blocks, X = bytes of a block, K = 32 values of a block
_Kind = GGMLQuantizationType
_PLAIN = {_Kind.F32: torch.float32, _Kind.F16: torch.float16, _Kind.BF16: torch.bfloat16}
_BLOCKS_PER_STEP = 1 << 17  # 16 MB of float32: bounds the temporary memory


def dequantize(data: torch.Tensor, tensor: GgufTensor) -> torch.Tensor:
    """Values of the stored bytes: float32 for quantised kinds, the stored type for F32, F16 and BF16."""
    if tensor.kind in _PLAIN:
        return data.view(_PLAIN[tensor.kind]).view(tensor.shape)
    if tensor.kind in _FAST:
        block_NX = data.view(-1, GGML_QUANT_SIZES[tensor.kind][1])
        values_NK = torch.empty(len(block_NX), 32)
        for rows in _steps(len(block_NX)):
            _FAST[tensor.kind](block_NX[rows], values_NK[rows])
        return values_NK.view(tensor.shape)
    stored = data.numpy().reshape(tensor.shape[0] if len(tensor.shape) > 1 else 1, -1)
    try:
        values = gguf.quants.dequantize(stored, tensor.kind)
    except NotImplementedError as error:
        raise CheckpointError(f"tensor {tensor.name!r}: type {tensor.kind.name} cannot be read") from error
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).view(tensor.shape)


def _steps(count: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCKS_PER_STEP) for start in range(0, count, _BLOCKS_PER_STEP))


def _halves(bytes_NX: torch.Tensor) -> torch.Tensor:
    return bytes_NX.contiguous().view(torch.float16).float()


def _q8_0(block_NX: torch.Tensor, out_NK: torch.Tensor) -> None:
    """2 bytes scale, 32 signed bytes."""
    out_NK.copy_(block_NX[:, 2:].view(torch.int8)).mul_(_halves(block_NX[:, :2]))


def _nibbles(bytes_NX: torch.Tensor, out_NK: torch.Tensor) -> None:
    out_NK[:, :16] = bytes_NX & 15
    out_NK[:, 16:] = bytes_NX >> 4


def _q4_0(block_NX: torch.Tensor, out_NK: torch.Tensor) -> None:
    """2 bytes scale, 32 nibbles of value + 8."""
    _nibbles(block_NX[:, 2:], out_NK)
    out_NK.sub_(8).mul_(_halves(block_NX[:, :2]))


def _q4_1(block_NX: torch.Tensor, out_NK: torch.Tensor) -> None:
    """2 bytes scale, 2 bytes minimum, 32 nibbles."""
    _nibbles(block_NX[:, 4:], out_NK)
    scale_minimum_N2 = _halves(block_NX[:, :4])
    out_NK.mul_(scale_minimum_N2[:, :1]).add_(scale_minimum_N2[:, 1:])


_FAST: dict[GGMLQuantizationType, Callable[[torch.Tensor, torch.Tensor], None]] = {
    _Kind.Q8_0: _q8_0,
    _Kind.Q4_0: _q4_0,
    _Kind.Q4_1: _q4_1,
}
