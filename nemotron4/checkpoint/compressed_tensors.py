"""Eight-bit weights in the ``compressed-tensors`` layout, as ``convert --quantize`` and others write them.

A weight W of a linear layer is stored as eight-bit values and ``W_scale``, one scale for each output row or
one for all; W = values * scale, in float32. Activations stay unquantised where such a weight is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemotron4.checkpoint.safetensors import StoredTensor
from nemotron4.errors import CheckpointError

METHOD = "compressed-tensors"
SCALE_SUFFIX = "_scale"
STORED = (torch.int8, torch.float8_e4m3fn)
READABLE_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")


def check_settings(settings: Any, source: Path) -> None:
    """Refuse every form but symmetric eight-bit weights with a scale for each row or for the whole."""
    values = settings if isinstance(settings, Mapping) else {"quant_method": settings}
    method = values.get("quant_method")
    if method != METHOD:
        raise _refused(source, f"the weights are quantised ({method})")
    if values.get("format") not in READABLE_FORMATS:
        raise _refused(source, f"the weights are packed as {values.get('format')!r}")
    for name in ("transform_config", "sparsity_config"):
        if values.get(name):
            raise _refused(source, f"the weights have a {name}")
    groups = values.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        weights = weights if isinstance(weights, Mapping) else {}
        kind = (weights.get("num_bits"), weights.get("symmetric", True), weights.get("strategy"))
        if kind not in ((8, True, "channel"), (8, True, "tensor")):
            raise _refused(
                source, f"{name} has weights of {kind[0]} bits, symmetric {kind[1]}, strategy {kind[2]!r}"
            )


def _refused(source: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: {what}; readable: {METHOD} with symmetric 8 bits for each row or tensor",
        hint="use the unquantised checkpoint, or a GGUF file of the quantised one",
    )


def scales(stored: Mapping[str, tuple[Path, StoredTensor]]) -> dict[str, str]:
    """Weight name -> name of its scale, for every eight-bit weight; each scale is checked to fit."""
    found: dict[str, str] = {}
    for name, (file, tensor) in stored.items():
        if tensor.dtype not in STORED:
            continue
        scale = stored.get(name + SCALE_SUFFIX)
        if scale is None or scale[1].shape not in ((tensor.shape[0], 1), (1,), (1, 1), ()):
            what = "is missing" if scale is None else f"has shape {list(scale[1].shape)}"
            raise CheckpointError(f"{file}: the scale of tensor {name!r} {what}")
        found[name] = name + SCALE_SUFFIX
    return found


def dequantized(values_RC: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 weight [R, C]; the scale is [R, 1] or one number."""
    return values_RC.float() * scale.float().reshape(-1, 1)
