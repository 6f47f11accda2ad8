"""In which numbers a model is computed, and by which path: chosen once, when it is loaded."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import lru_cache

import torch

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.errors import ConfigError, unknown_name
from nemotron4.inference.native.build import BuildError
from nemotron4.inference.native.library import Form, instruction_set

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTISED = {"int8": Form.S8, "int4": Form.U4}
_FLOATS = {torch.float32: Form.F32, torch.bfloat16: Form.BF16}
_PLAIN_GGUF = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Precision:
    """``is_native``: by the library, else in PyTorch. ``kind`` None: GGUF blocks as they are stored."""

    name: str
    is_native: bool
    kind: Form | None
    dtype: torch.dtype  # of keys and values; in PyTorch of the weights too


def choose(
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    has_adapter_beside: bool = False,
) -> Precision:
    """Raises ConfigError for a name that is unknown, and for ``quantize`` where it cannot be had."""
    if dtype != "auto" and dtype not in DTYPES:
        message, hint = unknown_name("dtype", dtype, ("auto", *DTYPES))
        raise ConfigError(message, hint=hint)
    if quantize is not None and quantize not in QUANTISED:
        message, hint = unknown_name("quantize", quantize, tuple(QUANTISED))
        raise ConfigError(message, hint=hint)
    if quantize is not None and dtype != "auto":
        raise ConfigError(
            f"dtype is {dtype!r} and quantize is {quantize!r}; a weight has one type",
            hint="leave one of them out",
        )
    obstacle = _obstacle(device, has_adapter_beside=has_adapter_beside)
    if quantize is not None:
        if obstacle is not None:
            raise ConfigError(f"quantize is {quantize!r}, which is not to be had here: {obstacle}")
        return Precision(quantize, True, QUANTISED[quantize], torch.bfloat16)
    if obstacle is None and dtype == "auto":
        stored = _quantised_type(checkpoint)
        if stored is not None:
            return Precision(stored, True, None, torch.bfloat16)
    chosen = DTYPES[dtype] if dtype != "auto" else _default(checkpoint, device, is_native=obstacle is None)
    name = str(chosen).removeprefix("torch.")
    if obstacle is None and chosen in _FLOATS:
        return Precision(name, True, _FLOATS[chosen], chosen)
    return Precision(name, False, None, chosen)


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of a model that PyTorch computes."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        message, hint = unknown_name("dtype", name, ("auto", *DTYPES))
        raise ConfigError(message, hint=hint)
    return DTYPES[name]


def _default(checkpoint: Checkpoint, device: torch.device, *, is_native: bool) -> torch.dtype:
    """bfloat16 where it loses nothing that the file has and the processor multiplies it; else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    stored = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].dtype
    is_short = stored.lower() in ("bfloat16", "bf16")
    return torch.bfloat16 if is_native and is_short and instruction_set() == "amx" else torch.float32


def _quantised_type(checkpoint: Checkpoint) -> str | None:
    """The type of most weights of a quantised GGUF file."""
    name = "model.layers.0.mlp.up_proj.weight"
    raw = checkpoint.raw_tensor(name)
    return None if raw is None or raw.kind in _PLAIN_GGUF else raw.kind


def _obstacle(device: torch.device, *, has_adapter_beside: bool) -> str | None:
    """Why the library cannot compute this model, in a few words."""
    if device.type != "cpu":
        return f"the kernels are for a CPU, not for {device.type}"
    if has_adapter_beside:
        return "an adapter next to the weights is computed in PyTorch"
    if os.environ.get("NEMOTRON4_NATIVE") == "0":
        return "NEMOTRON4_NATIVE is 0"
    return _library_obstacle()


@lru_cache(maxsize=1)
def _library_obstacle() -> str | None:
    try:
        instruction_set()
    except BuildError as error:
        print(f"note: {error}; computing in PyTorch, which is several times slower", file=sys.stderr)
        return str(error)
    return None
