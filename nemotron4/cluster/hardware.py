"""Accelerators: bandwidth and dense peak rates from their data sheets, memory as ``nvidia-smi`` reports it.

An "80 GB" card has 80 GiB of chips, of which about 79.6 GiB are visible: 85.5 GB, not 80.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from nemotron4.errors import ConfigError, unknown_name

Dtype = Literal["bf16", "fp8", "int8", "int4", "nvfp4"]  # of the linear layers


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator. Rates are dense (no sparsity); an absent type is computed at the bf16 rate."""

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float | None = None
    operations_per_s: Mapping[Dtype, float] = field(default_factory=dict)
    gpus_per_node: int = 8

    def rate(self, dtype: Dtype) -> float | None:
        """None for a GPU that is known by its memory alone."""
        return self.operations_per_s.get(dtype, self.operations_per_s.get("bf16"))


def _gpu(
    name: str, mebibytes: int, terabytes_per_s: float, *, per_node: int = 8, **tera_operations: float
) -> Gpu:
    dtypes: tuple[Dtype, ...] = get_args(Dtype)
    return Gpu(
        name=name,
        memory_bytes=mebibytes * 1024**2,
        bandwidth_bytes_per_s=terabytes_per_s * 1e12,
        operations_per_s={d: tera_operations[d] * 1e12 for d in dtypes if d in tera_operations},
        gpus_per_node=per_node,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 40960, 1.555, bf16=312, int8=624),
        _gpu("a100-80gb", 81920, 2.039, bf16=312, int8=624),
        _gpu("h100-80gb", 81559, 3.35, bf16=989, fp8=1979, int8=1979),
        _gpu("h100-nvl-94gb", 95830, 3.9, bf16=835, fp8=1671, int8=1671),
        _gpu("h100-pcie-80gb", 81559, 2.0, bf16=756, fp8=1513, int8=1513),
        _gpu("h20-96gb", 97871, 4.0, bf16=148, fp8=296, int8=296),
        _gpu("h200-141gb", 143771, 4.8, bf16=989, fp8=1979, int8=1979),
        _gpu("gh200-96gb", 97871, 4.0, per_node=1, bf16=989, fp8=1979, int8=1979),
        _gpu("b200-180gb", 183359, 8.0, bf16=2250, fp8=4500, int8=4500, nvfp4=9000),
        _gpu("b300-288gb", 275040, 8.0, bf16=2250, fp8=4500, int8=150, nvfp4=13500),
        _gpu("gb200-186gb", 189471, 8.0, per_node=4, bf16=2500, fp8=5000, int8=5000, nvfp4=10000),
        _gpu("gb300-288gb", 284208, 8.0, per_node=4, bf16=2500, fp8=5000, int8=165, nvfp4=15000),
        _gpu("mi300x-192gb", 196592, 5.3, bf16=1307, fp8=2615, int8=2615),
        _gpu("mi325x-256gb", 262128, 6.0, bf16=1307, fp8=2615, int8=2615),
        _gpu("mi350x-288gb", 294896, 8.0, bf16=2300, fp8=4600, int8=4600, nvfp4=9200),
        _gpu("mi355x-288gb", 294896, 8.0, bf16=2500, fp8=5000, int8=5000, nvfp4=10000),
        _gpu("rtx-pro-6000-96gb", 97887, 1.792, bf16=504, fp8=1007, int8=1007, nvfp4=2015),
        _gpu("rtx-6000-ada-48gb", 46068, 0.96, bf16=364, fp8=728, int8=728),
        _gpu("rtx-5090-32gb", 32607, 1.792, bf16=210, fp8=419, int8=838, nvfp4=1676),
        _gpu("rtx-4090-24gb", 24564, 1.008, bf16=165, fp8=330, int8=660),
        _gpu("l40s-48gb", 46068, 0.864, bf16=362, fp8=733, int8=733),
        _gpu("l4-24gb", 23034, 0.3, bf16=121, fp8=242, int8=242),
        _gpu("a10-24gb", 23028, 0.6, bf16=125, int8=250),
        _gpu("a6000-48gb", 49140, 0.768, bf16=155, int8=310),
    )
}


def gpu_named(name: str) -> Gpu:
    """Look a GPU up, with or without its memory in the name; ConfigError names the nearest known one."""
    short = [gpu for gpu in GPUS.values() if gpu.name.rpartition("-")[0] == name.lower()]
    if len(short) == 1:
        return short[0]
    if name.lower() not in GPUS:
        message, hint = unknown_name("GPU", name, GPUS)
        raise ConfigError(message, hint=f"{hint}; for any other: --gpu-memory GB [--gpu-bandwidth TB/s]")
    return GPUS[name.lower()]


def gpu_of_memory(gigabytes: float, *, terabytes_per_s: float | None = None) -> Gpu:
    """A GPU that is in no table. Without a bandwidth there are no rates, with one only those of decoding."""
    given = (gigabytes, 1.0 if terabytes_per_s is None else terabytes_per_s)
    if not all(0 < value < math.inf for value in given):  # no NaN either
        raise ConfigError(
            f"gpu_memory is {gigabytes} GB and gpu_bandwidth {terabytes_per_s} TB/s; expected more than 0"
        )
    bandwidth = None if terabytes_per_s is None else terabytes_per_s * 1e12
    return Gpu(
        name=f"{gigabytes:g} GB GPU", memory_bytes=int(gigabytes * 1e9), bandwidth_bytes_per_s=bandwidth
    )
