"""Accelerators: bandwidth and dense peak rates from their data sheets, memory as ``nvidia-smi`` reports it.

An "80 GB" card has 80 GiB of chips, of which about 79.6 GiB are visible: 85.5 GB, not 80.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nemotron4.errors import ConfigError, unknown_name

Dtype = Literal["bf16", "fp8", "int8"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator. Rates are dense (no sparsity); an absent type is computed at the bf16 rate."""

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    operations_per_s: Mapping[Dtype, float]
    gpus_per_node: int = 8

    def rate(self, dtype: Dtype) -> float:
        return self.operations_per_s.get(dtype, self.operations_per_s["bf16"])


def _gpu(name: str, mebibytes: int, terabytes_per_s: float, **tera_operations: float) -> Gpu:
    dtypes: tuple[Dtype, ...] = ("bf16", "fp8", "int8")
    return Gpu(
        name=name,
        memory_bytes=mebibytes * 1024**2,
        bandwidth_bytes_per_s=terabytes_per_s * 1e12,
        operations_per_s={d: tera_operations[d] * 1e12 for d in dtypes if d in tera_operations},
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 40960, 1.555, bf16=312, int8=624),
        _gpu("a100-80gb", 81920, 2.039, bf16=312, int8=624),
        _gpu("h100-80gb", 81559, 3.35, bf16=989, fp8=1979, int8=1979),
        _gpu("h200-141gb", 143771, 4.8, bf16=989, fp8=1979, int8=1979),
        _gpu("b200-180gb", 183359, 8.0, bf16=2250, fp8=4500, int8=4500),
        _gpu("l40s-48gb", 46068, 0.864, bf16=362, fp8=733, int8=733),
    )
}


def gpu_named(name: str) -> Gpu:
    """Look a GPU up; ConfigError names the nearest known one."""
    if name not in GPUS:
        message, hint = unknown_name("GPU", name, GPUS)
        raise ConfigError(message, hint=hint)
    return GPUS[name]
