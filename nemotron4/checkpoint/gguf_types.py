"""Values of a stored GGUF tensor. The slow, obvious version is ``gguf.quants.dequantize``.

Works in steps on the calling thread: temporaries stay in the processor's cache, and a step is long enough
that two threads which read two tensors seldom wait for the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gguf.quants
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nemotron4.checkpoint.gguf_file import GgufTensor
from nemotron4.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# N = blocks, X = bytes of a block, K = values of a block
Array = np.ndarray[Any, np.dtype[Any]]

_Kind = GGMLQuantizationType
_PLAIN = {_Kind.F32: "float32", _Kind.F16: "float16", _Kind.BF16: "bfloat16"}
_VALUES_PER_STEP = 1 << 17  # 512 KB of float32


def dequantize(data: torch.Tensor, tensor: GgufTensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Values of the stored bytes, which may become part of the result.

    Without ``dtype``: float32 for quantised kinds, the stored type for F32, F16 and BF16.
    """
    import torch

    if tensor.kind in _PLAIN:
        plain = data.view(getattr(torch, _PLAIN[tensor.kind])).view(tensor.shape)
        return plain if dtype is None else plain.to(dtype)
    block_size, block_bytes = GGML_QUANT_SIZES[tensor.kind]
    block_NX = data.numpy().reshape(-1, block_bytes)
    values_NK = torch.empty(len(block_NX), block_size, dtype=dtype or torch.float32)
    step = _VALUES_PER_STEP // block_size
    float_NK = torch.empty(step, block_size)
    for start in range(0, len(block_NX), step):
        target_NK = values_NK[start : start + step]
        if values_NK.dtype is torch.float32:
            _fill(block_NX[start : start + step], target_NK.numpy(), tensor.kind, tensor.name)
        else:
            part_NK = float_NK[: len(target_NK)]
            _fill(block_NX[start : start + step], part_NK.numpy(), tensor.kind, tensor.name)
            target_NK.copy_(float_NK[: len(target_NK)])
    return values_NK.view(tensor.shape)


def expand_rows(row_RX: Array, kind_name: str, name: str) -> Array:
    """float32 values of stored rows of a quantised kind, (rows, columns), without torch."""
    kind = GGMLQuantizationType[kind_name]
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    block_NX = np.ascontiguousarray(row_RX).reshape(-1, block_bytes)
    values_NK = np.empty((len(block_NX), block_size), np.float32)
    step = _VALUES_PER_STEP // block_size
    for start in range(0, len(block_NX), step):
        _fill(block_NX[start : start + step], values_NK[start : start + step], kind, name)
    return values_NK.reshape(len(row_RX), -1)


def _fill(block_NX: Array, out_NK: Array, kind: GGMLQuantizationType, name: str) -> None:
    """Write the blocks' values into ``out_NK``, float32."""
    if kind in _FAST:
        _FAST[kind](block_NX, out_NK)
        return
    try:
        out_NK[:] = gguf.quants.dequantize(block_NX, kind)
    except NotImplementedError as error:
        raise CheckpointError(f"tensor {name!r}: type {kind.name} cannot be read") from error


def _halves(bytes_NX: Array) -> Array:
    return np.ascontiguousarray(bytes_NX).view(np.float16).astype(np.float32)


def _q8_0(block_NX: Array, out_NK: Array) -> None:
    """2 bytes scale, 32 signed bytes."""
    out_NK[:] = block_NX[:, 2:].view(np.int8)
    out_NK *= _halves(block_NX[:, :2])


def _nibbles(bytes_NX: Array, out_NK: Array) -> None:
    """16 bytes: value i in the low half of byte i, value 16 + i in the high half."""
    both_NK = np.empty(out_NK.shape, np.uint8)
    np.bitwise_and(bytes_NX, 15, out=both_NK[:, :16])
    np.right_shift(bytes_NX, 4, out=both_NK[:, 16:])
    out_NK[:] = both_NK


def _q4_0(block_NX: Array, out_NK: Array) -> None:
    """2 bytes scale, 32 nibbles of value + 8."""
    _nibbles(block_NX[:, 2:], out_NK)
    out_NK -= 8
    out_NK *= _halves(block_NX[:, :2])


def _q4_1(block_NX: Array, out_NK: Array) -> None:
    """2 bytes scale, 2 bytes minimum, 32 nibbles."""
    _nibbles(block_NX[:, 4:], out_NK)
    scale_minimum_N2 = _halves(block_NX[:, :4])
    out_NK *= scale_minimum_N2[:, :1]
    out_NK += scale_minimum_N2[:, 1:]


_FAST: dict[GGMLQuantizationType, Callable[[Array, Array], None]] = {
    _Kind.Q8_0: _q8_0,
    _Kind.Q4_0: _q4_0,
    _Kind.Q4_1: _q4_1,
}
