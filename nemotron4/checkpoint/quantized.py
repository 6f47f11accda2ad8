"""Quantised weights of Hugging Face directories, expanded to float32 row by row.

A weight W of a linear layer is stored in several tensors; which ones says how (Legend: R = output rows,
C = input columns, G = groups of columns):

    W (8 bits), W_scale or W_scale_inv     W = values * scale; a scale for all, each row, group or block
    W_packed (int32), W_scale              b-bit integers + 2^(b-1), packed along the row, low bits first
    W_packed or W (uint8), W_scale, W_global_scale or W_scale_2     pairs of E2M1 numbers, scales in E4M3
    qweight, scales, qzeros                GPTQ [C/8, R] and AWQ [C, R/8]: stored column by column

Scales of activations and of the cache (``input_scale``, ``k_scale``, ...) are for engines that compute in
eight bits; the built-in engine computes with unquantised activations and leaves them out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron4.checkpoint.safetensors import DTYPES, StoredTensor, read_json, read_rows, read_tensor
from nemotron4.errors import CheckpointError

if TYPE_CHECKING:
    import torch

Place = tuple[Path, StoredTensor]

EIGHT_BIT = ("I8", "F8_E4M3", "F8_E5M2")
EXPANDED = ("compressed-tensors", "fp8", "modelopt", "gptq", "awq")
UNUSED = (
    *("input_scale", "output_scale", "k_scale", "v_scale", "q_scale", "prob_scale"),
    *("input_global_scale", "k_zero_point", "v_zero_point", "input_zero_point"),
)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble in which each of eight neighbouring columns is


@dataclass(frozen=True)
class Quantization:
    """What the files say about the weights. ``problem``: why the built-in engine cannot expand them."""

    method: str  # the word that transformers and vLLM use
    bits: int | None
    problem: str | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)  # the whole of it

    @property
    def has_gptq_v1_zeros(self) -> bool:
        """GPTQ's first format stores zero points minus 1."""
        return bool(self.entry.get("checkpoint_format", "gptq") != "gptq_v2")

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale, where the files say so: the last block may be smaller."""
        groups = (group.get("block_structure") for group in _weight_groups(self.entry))
        found = self.entry.get("weight_block_size") or next(groups, None)
        if isinstance(found, str):
            found = [int(size) for size in found.split("x") if size.isdigit()]
        return (int(found[0]), int(found[1])) if isinstance(found, list) and len(found) == 2 else None


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight: its shape, what a value is stored as, its tensors by suffix, and how rows are expanded."""

    shape: tuple[int, int]
    word: str
    parts: Mapping[str, Place]
    expand: Callable[[Mapping[str, Place], int, int], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for _, stored in self.parts.values())

    @property
    def file(self) -> Path:
        return next(iter(self.parts.values()))[0]

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, C]."""
        return self.expand(self.parts, start, stop)


def find_quantization(values: Mapping[str, Any], folder: Path) -> Quantization | None:
    """From ``config.json``, or ModelOpt's own file next to it. None for unquantised weights."""
    entry = values.get("quantization_config") or values.get("compression_config")
    own = folder / "hf_quant_config.json"
    if entry is None and own.is_file():
        inner = read_json(own).get("quantization")
        entry = {"quant_method": "modelopt", **(inner if isinstance(inner, Mapping) else {})}
    if entry is None:
        return None
    entry = entry if isinstance(entry, Mapping) else {"quant_method": entry}
    method = str(entry.get("quant_method", "compressed-tensors" if "config_groups" in entry else None))
    bits = _bits(entry, method)
    return Quantization(method, bits, _problem(entry, method), entry)


def _bits(entry: Mapping[str, Any], method: str) -> int | None:
    if method == "compressed-tensors":
        found = {group.get("num_bits") for group in _weight_groups(entry)}
        return found.pop() if len(found) == 1 else None
    if method == "bitsandbytes":
        return 4 if entry.get("load_in_4bit") else 8
    if method in ("fp8", "fbgemm_fp8") or "FP8" in str(entry.get("quant_algo", "")):
        return 8
    if "FP4" in str(entry.get("quant_algo", "")):
        return 4
    bits = entry.get("bits", entry.get("w_bit"))
    return bits if isinstance(bits, int) else None


def _weight_groups(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = entry.get("config_groups")
    found = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    return [group for group in found if isinstance(group, Mapping)]


def _problem(entry: Mapping[str, Any], method: str) -> str | None:
    if method not in EXPANDED:
        return f"the weights are quantised ({method})"
    if method == "compressed-tensors":
        for name in ("transform_config", "sparsity_config"):
            given = entry.get(name)
            if given and not (isinstance(given, Mapping) and given.get("format") == "dense"):
                return f"the weights have a {name}"
        readable = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
        if entry.get("format") not in (*readable, "nvfp4-pack-quantized", "mixed-precision"):
            return f"the weights are packed as {entry.get('format')!r}"
    if method in ("gptq", "awq") and _bits(entry, method) != 4:
        return f"the weights have {_bits(entry, method)} bits ({method})"
    if method == "awq" and str(entry.get("version", "gemm")).lower() != "gemm":
        return f"the weights are packed as AWQ {entry.get('version')!r}"
    if method == "modelopt" and entry.get("quant_algo") not in ("FP8", "NVFP4", None):
        return f"the weights are quantised ({method} {entry.get('quant_algo')})"
    return None


def require_expandable(quantization: Quantization | None, source: Path) -> None:
    """For the built-in engine and for conversions, before a byte of weights is read."""
    if quantization is not None and quantization.problem is not None:
        raise CheckpointError(
            f"{source}: {quantization.problem}; expanded here: {', '.join(EXPANDED)} in 8 or 4 bits",
            hint="serve it with --engine vllm, or use the unquantised checkpoint or a GGUF file",
        )


def quantized_weights(
    stored: Mapping[str, Place], quantization: Quantization
) -> tuple[dict[str, QuantizedWeight], list[str]]:
    """Every quantised weight by its plain name, and the names of the scales that are left out."""
    weights: dict[str, QuantizedWeight] = {}
    for name, (file, tensor) in stored.items():
        stem, _, suffix = name.rpartition(".")
        if suffix == "weight_packed" or (suffix == "weight" and tensor.word == "U8"):
            weights[f"{stem}.weight"] = _packed(stored, stem, suffix)
        elif suffix == "weight" and tensor.word in EIGHT_BIT:
            weights[name] = _eight_bit(stored, stem, file, tensor, quantization.block)
        elif suffix == "qweight":
            weights[f"{stem}.weight"] = _by_column(stored, stem, quantization)
    used = {part[1].name for weight in weights.values() for part in weight.parts.values()}
    left = [n for n in stored if n not in used and n.rpartition(".")[2] in UNUSED]
    return weights, left


# What is stored column by column serves many blocks of rows.
_whole = functools.lru_cache(maxsize=3)(read_tensor)


def _parts(stored: Mapping[str, Place], stem: str, needed: tuple[str, ...], more: tuple[str, ...]) -> Any:
    for suffix in needed:
        if f"{stem}.{suffix}" not in stored:
            file = next(place[0] for name, place in stored.items() if name.startswith(f"{stem}."))
            raise CheckpointError(f"{file}: tensor {stem + '.' + suffix!r} is missing: {stem} is quantised")
    return {s: stored[f"{stem}.{s}"] for s in (*needed, *more) if f"{stem}.{s}" in stored}


# -- eight bits --------------------------------------------------------------------------------------------


def _eight_bit(
    stored: Mapping[str, Place], stem: str, file: Path, tensor: StoredTensor, block: tuple[int, int] | None
) -> QuantizedWeight:
    scale = "weight_scale_inv" if f"{stem}.weight_scale_inv" in stored else "weight_scale"
    if f"{stem}.{scale}" not in stored:
        raise CheckpointError(f"{file}: the scale of tensor {tensor.name!r} is missing")
    parts = _parts(stored, stem, ("weight", scale), ("weight_zero_point",))
    shape = (tensor.shape[0], tensor.shape[1])
    found = parts[scale][1].shape
    grid = found if len(found) == 2 else (*found, 1)[:2] if len(found) == 1 else (1, 1)
    sides = block or tuple(-(-size // n) if size % n == 0 else 0 for n, size in zip(grid, shape, strict=True))
    if len(found) > 2 or not all(
        n in (1, size) or (side and n == -(-size // side))
        for n, size, side in zip(grid, shape, sides, strict=True)
    ):
        raise CheckpointError(f"{file}: the scale of tensor {tensor.name!r} has shape {list(found)}")
    word = DTYPES[tensor.word][0]
    return QuantizedWeight(
        shape,
        word,
        {"weight": parts["weight"], "scale": parts[scale]}
        | {name: part for name, part in parts.items() if name == "weight_zero_point"},
        functools.partial(_expand_eight_bit, sides=sides),
    )


def _expand_eight_bit(
    parts: Mapping[str, Place], start: int, stop: int, *, sides: tuple[int, ...]
) -> torch.Tensor:
    values_RC = read_rows(*parts["weight"], start, stop).float()
    num_rows = parts["weight"][1].shape[0]
    if "weight_zero_point" in parts:
        values_RC -= _spread(parts["weight_zero_point"], num_rows, start, stop, values_RC.shape[1], sides)
    return values_RC * _spread(parts["scale"], num_rows, start, stop, values_RC.shape[1], sides)


def _spread(
    place: Place, num_rows: int, start: int, stop: int, num_columns: int, sides: tuple[int, ...]
) -> torch.Tensor:
    """The scales of rows ``start:stop``: [1, 1], [R, 1] or a value for each column."""
    import torch

    scale = read_tensor(*place).float()
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    if scale.shape[0] not in (1, num_rows):  # blocks of rows
        scale = scale[torch.arange(start, stop) // sides[0]]
    elif scale.shape[0] == num_rows and num_rows > 1:
        scale = scale[start:stop]
    if scale.shape[1] not in (1, num_columns):  # groups of columns
        scale = scale.repeat_interleave(sides[1], dim=1)[:, :num_columns]
    return scale


# -- integers and E2M1 numbers, packed along the row -------------------------------------------------------


def _packed(stored: Mapping[str, Place], stem: str, suffix: str) -> QuantizedWeight:
    file, tensor = stored[f"{stem}.{suffix}"]
    if tensor.word == "U8":
        whole = "weight_global_scale" if suffix == "weight_packed" else "weight_scale_2"
        parts = _parts(stored, stem, (suffix, "weight_scale", whole), ())
        return QuantizedWeight((tensor.shape[0], 2 * tensor.shape[1]), "nvfp4", parts, _expand_e2m1)
    more = ("weight_shape", "weight_zero_point", "weight_g_idx")
    parts = _parts(stored, stem, (suffix, "weight_scale"), more)
    columns = tensor.shape[1] * 8  # four bits
    if "weight_shape" in parts:
        columns = int(read_tensor(*parts["weight_shape"])[1])
    bits = next((b for b in (4, 8) if -(-columns * b // 32) == tensor.shape[1]), None)
    if bits is None:
        raise CheckpointError(
            f"{file}: tensor {tensor.name!r} of shape {list(tensor.shape)} does not hold rows of {columns} "
            "values in 4 or 8 bits"
        )
    _require_groups(parts, "weight_g_idx", columns, parts["weight_scale"][1].shape[-1])
    return QuantizedWeight((tensor.shape[0], columns), f"int{bits}", parts, _expand_packed)


def _require_groups(parts: Mapping[str, Place], index: str, columns: int, num_groups: int) -> None:
    """Groups of one size, or the group of each column: else which column has which scale is a guess."""
    if index not in parts and columns % max(1, num_groups):
        file, tensor = next(iter(parts.values()))
        raise CheckpointError(f"{file}: tensor {tensor.name!r}: {num_groups} groups of {columns} columns")


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, N] -> [R, N * 32 / bits], low bits first."""
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(1)


def _expand_packed(parts: Mapping[str, Place], start: int, stop: int) -> torch.Tensor:
    import torch

    place = parts["weight_packed"]
    num_rows, num_words = place[1].shape
    columns = num_words * 8
    if "weight_shape" in parts:
        columns = int(read_tensor(*parts["weight_shape"])[1])
    bits = 4 if -(-columns * 4 // 32) == num_words else 8
    values_RC = _unpack(read_rows(*place, start, stop), bits)[:, :columns].float()
    scale = read_tensor(*parts["weight_scale"]).float()
    scale = scale[start:stop] if scale.shape[0] == num_rows else scale
    zero: torch.Tensor | float = float(2 ** (bits - 1))
    if "weight_zero_point" in parts:  # packed along the rows
        packed_GR = read_tensor(*parts["weight_zero_point"]).T.contiguous()
        zero = _unpack(packed_GR, bits)[:, start:stop].T.float()
    group_C = _group_of_column(parts.get("weight_g_idx"), columns, scale.shape[1])
    if isinstance(zero, torch.Tensor):
        zero = zero[:, group_C]
    expanded_RC: torch.Tensor = (values_RC - zero) * scale[:, group_C]
    return expanded_RC


def _group_of_column(place: Place | None, columns: int, num_groups: int) -> torch.Tensor:
    import torch

    if place is not None:
        index_C = read_tensor(*place).long()
        if bool((index_C >= 0).all()):
            return index_C
    return torch.arange(columns) // -(-columns // num_groups)


def _expand_e2m1(parts: Mapping[str, Place], start: int, stop: int) -> torch.Tensor:
    """compressed-tensors divides by its global scale, ModelOpt multiplies with its ``weight_scale_2``."""
    import torch

    name = "weight_packed" if "weight_packed" in parts else "weight"
    pairs_RX = read_rows(*parts[name], start, stop)
    nibbles_RC = torch.stack((pairs_RX & 15, pairs_RX >> 4), dim=-1).flatten(1)
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    scale_RG = read_rows(*parts["weight_scale"], start, stop).float()
    if "weight_global_scale" in parts:
        scale_RG = scale_RG / read_tensor(*parts["weight_global_scale"]).float().reshape(())
    else:
        scale_RG = scale_RG * read_tensor(*parts["weight_scale_2"]).float().reshape(())
    width = nibbles_RC.shape[1] // scale_RG.shape[1]
    values_RC: torch.Tensor = table[nibbles_RC.long()] * scale_RG.repeat_interleave(width, dim=1)
    return values_RC


# -- GPTQ and AWQ, packed column by column -----------------------------------------------------------------


def _by_column(stored: Mapping[str, Place], stem: str, quantization: Quantization) -> QuantizedWeight:
    parts = _parts(stored, stem, ("qweight", "scales", "qzeros"), ("g_idx",))
    rows, columns = parts["qweight"][1].shape[::-1]
    num_inputs = columns if quantization.method == "awq" else columns * 8
    _require_groups(parts, "g_idx", num_inputs, parts["scales"][1].shape[0])
    if quantization.method == "awq":
        return QuantizedWeight((rows * 8, columns), "int4", parts, _expand_awq)
    expand = functools.partial(_expand_gptq, added_to_zeros=1 if quantization.has_gptq_v1_zeros else 0)
    return QuantizedWeight((rows, columns * 8), "int4", parts, expand)


def _expand_gptq(parts: Mapping[str, Place], start: int, stop: int, *, added_to_zeros: int) -> torch.Tensor:
    packed_RX = _whole(*parts["qweight"])[:, start:stop].T.contiguous()
    values_RC = _unpack(packed_RX, 4).float()
    scale_GR = _whole(*parts["scales"])[:, start:stop].float()
    zero_GR = (_unpack(_whole(*parts["qzeros"]), 4)[:, start:stop] + added_to_zeros).float()
    group_C = _group_of_column(parts.get("g_idx"), values_RC.shape[1], scale_GR.shape[0])
    return (values_RC - zero_GR.T[:, group_C]) * scale_GR.T[:, group_C]


def _expand_awq(parts: Mapping[str, Place], start: int, stop: int) -> torch.Tensor:
    first, last = start // 8, -(-stop // 8)
    rows = slice(start - 8 * first, stop - 8 * first)
    order = [8 * word + AWQ_ORDER[i] for word in range(last - first) for i in range(8)]
    values_CR = _unpack(_whole(*parts["qweight"])[:, first:last].contiguous(), 4)[:, order][:, rows]
    zero_GR = _unpack(_whole(*parts["qzeros"])[:, first:last].contiguous(), 4)[:, order][:, rows]
    scale_GR = _whole(*parts["scales"])[:, start:stop].float()
    group_C = _group_of_column(None, values_CR.shape[0], scale_GR.shape[0])
    return (values_CR.T.float() - zero_GR.float().T[:, group_C]) * scale_GR.T[:, group_C]
