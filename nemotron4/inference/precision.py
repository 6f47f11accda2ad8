"""In which numbers a model is computed, and by which path: chosen once, when it is loaded."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from nemotron4.checkpoint.interface import PLAIN, Checkpoint
from nemotron4.errors import ConfigError, unknown_name
from nemotron4.inference.native.build import BuildError
from nemotron4.inference.native.library import Form, instruction_set

if TYPE_CHECKING:
    import torch

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # torch's names -> bytes
QUANTISED = {"int8": Form.S8, "int4": Form.U4}
FLOATS = {"float32": Form.F32, "bfloat16": Form.BF16}
CACHES = {**FLOATS, "int8": Form.S8}  # of keys and values
CACHE_TYPES = ("auto", "int8")
TYPICAL = "model.layers.0.mlp.up_proj.weight"  # its type is that of most weights


@dataclass(frozen=True)
class Precision:
    """``is_native``: by the library, else in PyTorch. ``kind`` None: GGUF blocks as they are stored."""

    name: str
    is_native: bool
    kind: Form | None
    dtype: str  # of keys and values; in PyTorch of the weights too


def check_cache_type(name: str) -> None:
    if name not in CACHE_TYPES:
        raise ConfigError(
            f"kv_cache_dtype is {name!r}; the built-in engine has {' and '.join(CACHE_TYPES)}",
            hint="leave it out, or add --engine vllm",
        )


def choose(
    checkpoint: Checkpoint,
    device: str,
    *,
    dtype: str = "auto",
    quantize: str | None = None,
    kv_cache_dtype: str = "auto",
    has_adapter_beside: bool = False,
) -> Precision:
    """Raises ConfigError for a name that is unknown, and for what cannot be had here."""
    check_cache_type(kv_cache_dtype)
    found = _of_weights(
        checkpoint, device, dtype=dtype, quantize=quantize, has_adapter_beside=has_adapter_beside
    )
    if kv_cache_dtype == "auto":
        return found
    if not found.is_native or found.dtype != "bfloat16":
        raise ConfigError(
            f"kv_cache_dtype is {kv_cache_dtype!r}, which weights in {found.name} on {device} do not have",
            hint="it goes with bfloat16 and quantised weights, by the library on a CPU",
        )
    return replace(found, dtype=kv_cache_dtype)


def _of_weights(
    checkpoint: Checkpoint, device: str, *, dtype: str, quantize: str | None, has_adapter_beside: bool
) -> Precision:
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
        return Precision(quantize, True, QUANTISED[quantize], "bfloat16")
    if obstacle is None and dtype == "auto":
        stored = _quantised_type(checkpoint)
        if stored is not None:
            return Precision(stored, True, None, "bfloat16")
        if checkpoint.format == "gguf" and _stored_dtype(checkpoint) not in PLAIN:  # an adapter changed it
            return Precision("int8", True, Form.S8, "bfloat16")
    name = dtype if dtype != "auto" else _default(checkpoint, device, is_native=obstacle is None)
    if obstacle is None and name in FLOATS:
        return Precision(name, True, FLOATS[name], name)
    return Precision(name, False, None, name)


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of a model that PyTorch computes."""
    import torch

    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        message, hint = unknown_name("dtype", name, ("auto", *DTYPES))
        raise ConfigError(message, hint=hint)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _default(checkpoint: Checkpoint, device: str, *, is_native: bool) -> str:
    """bfloat16 where it loses nothing that the file has and the processor multiplies it; else float32."""
    if device != "cpu":
        return "bfloat16"
    is_short = _stored_dtype(checkpoint).lower() in ("bfloat16", "bf16")
    return "bfloat16" if is_native and is_short and instruction_set() in ("bf16", "amx") else "float32"


def _stored_dtype(checkpoint: Checkpoint) -> str:
    return checkpoint.tensors[TYPICAL].dtype


def _quantised_type(checkpoint: Checkpoint) -> str | None:
    """The type of most weights of a quantised GGUF file."""
    raw = checkpoint.raw_tensor(TYPICAL, 0, 0)
    return None if raw is None or raw.kind in PLAIN else raw.kind


def _obstacle(device: str, *, has_adapter_beside: bool) -> str | None:
    """Why the library cannot compute this model, in a few words."""
    if device != "cpu":
        return f"the kernels are for a CPU, not for {device}"
    if has_adapter_beside:
        return "a bottleneck or P-tuning adapter is computed in PyTorch"
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
