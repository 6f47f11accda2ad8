"""The C interface of native.h for Python: its structures, and the calls with checks of what they get."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_void_p
from enum import IntEnum
from functools import cache, lru_cache

from nemotron4.errors import ConfigError, unknown_name
from nemotron4.inference.native.build import STEP, BuildError, load_library

VERSION = 8
GROUP = 32  # input columns that share a scale
PANEL = 16  # output rows that lie side by side
BLOCK = 32  # positions of a block of the cache
INSTRUCTION_SETS = ("avx2", "avx512", "vnni", "bf16", "amx", "generic")


class Form(IntEnum):
    """How a weight is stored; native.h says where each number lies."""

    F32 = 0
    BF16 = 1
    S8 = 2
    U4 = 3


class CWeight(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("kind", "rows", "cols", "panels", "padded", "is_wide")),
        ("is_by_input", c_int32),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
    )


class CNorm(ctypes.Structure):
    _fields_ = (("gamma", c_void_p), ("beta", c_void_p))


class CLayer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", CNorm),
        ("mlp_norm", CNorm),
        ("qkv", CWeight * 3),
        ("out", CWeight),
        ("up", CWeight * 2),
        ("down", CWeight),
        ("num_qkv", c_int32),
        ("num_up", c_int32),
    )


class CModel(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("num_layers", "hidden", "ffn", "heads", "kv_heads", "head_dim")),
        *((name, c_int32) for name in ("vocab", "rotary_dim", "is_gated")),
        ("eps", c_float),
        ("layers", POINTER(CLayer)),
        ("final_norm", CNorm),
        ("head", CWeight),
        ("embedding", c_void_p),
        ("embedding_is_bf16", c_int32),
        ("virtual_rows", c_void_p),
        ("inverse_frequency", c_void_p),
        ("rotary_factor", c_float),
        ("cache_kind", c_int32),
        ("keys", c_void_p),
        ("values", c_void_p),
    )


class CDraw(ctypes.Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("size", c_int32),
        ("top_k", c_int32),
        ("temperature", c_float),
        *((name, c_double) for name in ("top_p", "min_p", "point")),
        ("token", c_int32),
    )


class CLow(ctypes.Structure):
    _fields_ = (("down", CWeight), ("up", CWeight), ("column", c_int32))


class CLayerAdapter(ctypes.Structure):
    _fields_ = (("lows", CLow * 7),)


class CStep(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("num_rows", "num_sequences", "num_logits")),
        *((name, c_void_p) for name in ("tokens", "positions", "first_rows", "first_blocks", "blocks")),
        *((name, c_void_p) for name in ("logit_rows", "hidden", "logits", "adapters")),
    )


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The library with its calls declared. Raises BuildError."""
    found = load_library(STEP)
    if found.native_version() != VERSION:
        raise BuildError(f"{found._name} is of another version")
    found.native_isa.restype = c_char_p
    found.native_isa.argtypes = (c_char_p,)
    found.native_load.argtypes = (c_char_p, c_void_p)
    found.native_load.restype = None
    found.native_open.restype = c_void_p
    found.native_open.argtypes = (POINTER(CModel), c_int32, c_char_p)
    found.native_close.argtypes = (c_void_p,)
    found.native_close.restype = None
    found.native_step.argtypes = (c_void_p, POINTER(CStep))
    found.native_step.restype = None
    found.native_run_on.argtypes = (
        c_void_p, POINTER(CStep), POINTER(CDraw), c_int32, POINTER(c_int32), c_int32,
    )  # fmt: skip
    found.native_logits.argtypes = (c_void_p, c_void_p, c_int32, c_void_p)
    found.native_logits.restype = None
    found.native_pack.argtypes = (POINTER(CWeight), c_void_p, c_int32, c_int32)
    found.native_pack.restype = None
    found.native_product.argtypes = (POINTER(CWeight), c_void_p, c_int32, c_char_p, c_void_p)
    found.native_draw.argtypes = (c_void_p, POINTER(CDraw), c_int32)
    found.native_draw.restype = None
    found.native_pack_gguf.argtypes = (POINTER(CWeight), c_int32, c_void_p, c_int32, c_int32)
    return found


def wanted_isa() -> bytes:
    """``NEMOTRON4_ISA``: the most that the kernels may use, for tests and comparisons; empty: everything."""
    name = os.environ.get("NEMOTRON4_ISA", "")
    if name and name not in INSTRUCTION_SETS:
        message, hint = unknown_name("NEMOTRON4_ISA", name, INSTRUCTION_SETS)
        raise ConfigError(message, hint=hint)
    return name.encode()


def instruction_set() -> str:
    """The kernels that are taken here, loaded. Raises BuildError."""
    name: bytes = library().native_isa(wanted_isa())
    if not name:
        raise BuildError("this processor has no AVX2")
    load_kernels(name.decode())
    return name.decode()


@cache
def load_kernels(isa: str) -> None:
    """Raises BuildError."""
    kernels = load_library(isa).kernels
    kernels.restype = c_void_p
    library().native_load(isa.encode(), kernels())


@lru_cache(maxsize=1)
def sampler() -> ctypes.CDLL | None:
    """The library for drawing tokens, or None where PyTorch draws them."""
    if os.environ.get("NEMOTRON4_NATIVE") == "0":
        return None
    try:
        instruction_set()
    except BuildError:
        return None
    return library()
