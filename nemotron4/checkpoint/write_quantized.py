"""Linear layers in eight or four bits, as the ``compressed-tensors`` layout keeps them, streamed.

int8         symmetric, a scale for each output row, max|w| / 127; activations by the engine, per token
fp8          E4M3, a scale for each output row, max|w| / 448; activations by the engine, per token
fp8-static   the same, and a scale for each layer's input, measured on texts, one block in memory at a time
int4         W4A16: groups of 128 columns, packed into int32
nvfp4        E2M1, groups of 16 columns with a scale in E4M3, and one for the tensor (shared by q, k and v)

A scale is rounded to its stored type first, so that what is written is what is meant. int4 takes the one of a
few with the least squared error; where texts were given, int4 and nvfp4 weigh the error of a column by the
mean square of its input, which is the error of the layer's output if the inputs are independent.
Legend: R = output rows, C = input columns, G = groups of columns, N = columns of a group; B = texts,
T = positions, D = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nemotron4.checkpoint.convert_files import Blocks
from nemotron4.checkpoint.interface import Checkpoint, blocks
from nemotron4.checkpoint.nemo_files import as_bytes
from nemotron4.checkpoint.quantized import E2M1
from nemotron4.checkpoint.write_safetensors import Entry, Group
from nemotron4.errors import CheckpointError, DataError
from nemotron4.model.attention import CausalAttend, RotaryEmbedding
from nemotron4.model.transformer import Block

NUM_TEXTS, NUM_TOKENS = 64, 512


class LayerInputs(NamedTuple):
    """The largest input of a layer, and the mean square of each of its inputs."""

    largest: float
    squares_C: Tensor


def calibration_tokens(path: Path, checkpoint: Checkpoint) -> list[list[int]]:
    """The first paragraphs of a text file, each cut to ``NUM_TOKENS``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}", hint="give a text file in UTF-8") from error
    tokenizer = checkpoint.tokenizer()
    paragraphs = [part for part in text.split("\n\n") if part.strip()][:NUM_TEXTS]
    longest = min(NUM_TOKENS, checkpoint.config.context_length)
    rows = [tokenizer.encode(part)[:longest] for part in paragraphs]
    rows = [row for row in rows if row]
    if not rows:
        raise DataError(f"{path}: no text in it")
    return rows


@torch.no_grad()
def measure_inputs(checkpoint: Checkpoint, rows: list[list[int]]) -> dict[str, LayerInputs]:
    """Name of each linear layer of the blocks -> its inputs on the rows of token ids."""
    config = checkpoint.config
    rotary = RotaryEmbedding(config)
    ids = sorted({token_id for row in rows for token_id in row})
    embedded = {i: checkpoint.read_rows("model.embed_tokens.weight", i, i + 1, torch.float32)[0] for i in ids}
    hidden = [torch.stack([embedded[i] for i in row])[None] for row in rows]
    found: dict[str, LayerInputs] = {}
    num_tokens = sum(map(len, rows))
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        with torch.device("meta"):
            block = Block(config, layer)
        state = {name: checkpoint.read(f"{prefix}.{name}", torch.float32) for name in block.state_dict()}
        block.load_state_dict(state, assign=True)
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(partial(_note, found, f"{prefix}.{name}", num_tokens))
        for at, hidden_BTD in enumerate(hidden):
            positions_BT = torch.arange(hidden_BTD.shape[1])[None]
            rotation = rotary(positions_BT, torch.float32)
            hidden[at] = block(hidden_BTD, rotation, CausalAttend(None))
    return found


def _note(
    found: dict[str, LayerInputs], name: str, num_tokens: int, module: nn.Module, inputs: tuple[Any, ...]
) -> None:
    value: Tensor = inputs[0]
    largest = max(1e-6, float(value.abs().max()))
    squares_C = value.square().flatten(0, -2).sum(0) / num_tokens
    if name in found:
        largest, squares_C = max(largest, found[name].largest), squares_C + found[name].squares_C
    found[name] = LayerInputs(largest, squares_C)


Scheme = Literal["int8", "fp8", "fp8-static", "int4", "nvfp4"]

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8-static": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": 448.0, "fp8-static": 448.0}
FORMATS = {
    "int8": "int-quantized",
    "fp8": "float-quantized",
    "fp8-static": "float-quantized",
    "int4": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}
INT4_GROUP, NVFP4_GROUP = 128, 16
# Of the scale that reaches the largest value. E2M1 is finer where that value is 4, not 6.
INT4_SHARES = tuple(1.12 - 0.045 * i for i in range(12))
NVFP4_SHARES = (1.5, 1.0, 0.93, 0.87, 0.8, 0.73)
# Where E2M1 rounds up, ties to even: at the threshold itself, or just above it.
E2M1_STEPS = (
    *(math.nextafter(0.25, 1), 0.75, math.nextafter(1.25, 2), 1.75),
    *(math.nextafter(2.5, 3), 3.5, math.nextafter(5.0, 6)),
)
FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # one matrix in vLLM


class Quantized(NamedTuple):
    """Values as they are stored, their scales, and what they mean, in float32."""

    values: torch.Tensor
    scale: torch.Tensor
    restored_RC: torch.Tensor


def quantize_rows(weight_RC: torch.Tensor, scheme: Scheme, *, scale_dtype: torch.dtype) -> Quantized:
    """Eight bits, in float32. A row of zeros has scale 1."""
    weight_RC = weight_RC.float()
    largest_R1 = torch.linalg.vector_norm(weight_RC, torch.inf, dim=1, keepdim=True)
    scale_R1 = torch.where(largest_R1 > 0, largest_R1 / LARGEST[scheme], 1.0).to(scale_dtype)
    # A scale below the smallest number of its type would divide by zero.
    scale_R1 = scale_R1.clamp(min=torch.finfo(scale_dtype).tiny)
    scaled_RC = weight_RC / scale_R1.float()
    scaled_RC = scaled_RC.clamp_(-LARGEST[scheme], LARGEST[scheme])
    if scheme == "int8":
        scaled_RC = scaled_RC.round_()
    values_RC = scaled_RC.to(STORED[scheme])
    return Quantized(values_RC, scale_R1, values_RC.float().mul_(scale_R1.float()))


def best_scales(
    weight_RGN: torch.Tensor,
    scales: Iterable[torch.Tensor],
    round_: Callable[[torch.Tensor], torch.Tensor],
    input_squares_C: torch.Tensor | None,
) -> torch.Tensor:
    """The best of the ``scales`` (R x G x 1 each) for every group; ``round_`` gives the values there are."""
    best_RG1 = torch.full_like(weight_RGN[..., :1], torch.inf)
    chosen_RG1 = torch.ones_like(best_RG1)
    squares_GN = None if input_squares_C is None else input_squares_C.view(weight_RGN.shape[1:])
    for tried_RG1 in scales:
        error_RGN = round_(weight_RGN / tried_RG1).mul_(tried_RG1).sub_(weight_RGN).square_()
        if squares_GN is not None:
            error_RGN.mul_(squares_GN)
        error_RG1 = error_RGN.sum(2, keepdim=True)
        is_better = error_RG1 < best_RG1
        best_RG1 = torch.where(is_better, error_RG1, best_RG1)
        chosen_RG1 = torch.where(is_better, tried_RG1, chosen_RG1)
    return chosen_RG1


def quantize_int4(
    weight_RC: torch.Tensor,
    *,
    group: int,
    scale_dtype: torch.dtype,
    input_squares_C: torch.Tensor | None = None,
) -> Quantized:
    """Values -8 to 7 of each group, with the best of a few scales."""
    weight_RGN = weight_RC.float().reshape(len(weight_RC), -1, group)
    least = torch.finfo(scale_dtype).tiny
    largest_RG1 = weight_RGN.abs().amax(2, keepdim=True)
    scales = (
        (largest_RG1 * (share / 7.5)).to(scale_dtype).float().clamp_(min=least) for share in INT4_SHARES
    )
    scale_RG1 = best_scales(weight_RGN, scales, lambda x: x.round_().clamp_(-8, 7), input_squares_C)
    values_RGN = (weight_RGN / scale_RG1).round_().clamp_(-8, 7)
    restored_RC = (values_RGN * scale_RG1).flatten(1)
    nibbles = (values_RGN + 8).to(torch.int32).reshape(len(weight_RC), -1, 8)
    packed = nibbles[..., 0].clone()
    for place in range(1, 8):
        packed |= nibbles[..., place] << 4 * place
    return Quantized(packed, scale_RG1.squeeze(2).to(scale_dtype), restored_RC)


def quantize_nvfp4(
    weight_RC: torch.Tensor, *, whole: float, input_squares_C: torch.Tensor | None = None
) -> Quantized:
    """``whole`` is the tensor's own factor: a group's scale is stored times it, in E4M3."""
    weight_RGN = weight_RC.float().reshape(len(weight_RC), -1, NVFP4_GROUP)
    largest_RG1 = weight_RGN.abs().amax(2, keepdim=True)

    def stored(share: float) -> torch.Tensor:
        scale_RG1 = (largest_RG1 * (share / 6 * whole)).clamp_(max=448).to(torch.float8_e4m3fn).float()
        return torch.where(scale_RG1 == 0, 0.125, scale_RG1)

    # Without inputs it is the largest value's: the least error of the weights made the demo model worse.
    shares = (1.0,) if input_squares_C is None else NVFP4_SHARES
    scales = (stored(share) / whole for share in shares)
    scale_RG1 = best_scales(weight_RGN, scales, lambda x: _e2m1(_e2m1_index(x), x), input_squares_C)
    scaled_RGN = weight_RGN / scale_RG1
    index_RGN = _e2m1_index(scaled_RGN)
    restored_RGN = _e2m1(index_RGN, scaled_RGN) * scale_RG1
    codes = (index_RGN.to(torch.uint8) | (torch.signbit(scaled_RGN).to(torch.uint8) << 3)).flatten(1)
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    stored_RG = (scale_RG1 * whole).to(torch.float8_e4m3fn).squeeze(2)
    return Quantized(packed, stored_RG, restored_RGN.flatten(1))


def _e2m1_index(scaled: torch.Tensor) -> torch.Tensor:
    return torch.bucketize(scaled.abs(), torch.tensor(E2M1_STEPS), right=True, out_int32=True)


def _e2m1(index: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
    return torch.tensor(E2M1)[index].copysign(scaled)


class ErrorSum:
    """Relative error of a tensor seen in blocks: ||w - w'|| / ||w|| and the largest |w - w'|."""

    def __init__(self) -> None:
        self._error = self._weight = self._largest = 0.0

    def add(self, weight_RC: torch.Tensor, restored_RC: torch.Tensor) -> None:
        """``restored_RC`` is overwritten."""
        weight_RC = weight_RC.float()
        error_RC = restored_RC.sub_(weight_RC)
        self._error += _sum_of_squares(error_RC)
        self._weight += _sum_of_squares(weight_RC)
        least, most = error_RC.aminmax()
        self._largest = max(self._largest, -float(least), float(most))

    def to_json(self) -> dict[str, float]:
        relative = (self._error / self._weight) ** 0.5 if self._weight else 0.0
        return {"relative_error": relative, "largest_error": self._largest}


def _sum_of_squares(values_RC: torch.Tensor) -> float:
    """In float32 within a row, in float64 over the rows; without a copy of the values."""
    return float(torch.linalg.vector_norm(values_RC, dim=1).double().square().sum())


def int4_group(checkpoint: Checkpoint) -> int:
    """Columns of a group, one size for the file: 128, or 32 where a layer's rows do not divide by it.

    Models of such rows are small and lose most by four bits; 64 would save a seventeenth of the file.
    """
    widths = {
        info.shape[1]
        for name, info in checkpoint.tensors.items()
        if name.startswith("model.layers.") and name.endswith("_proj.weight")
    }
    group = next((size for size in (INT4_GROUP, 32) if all(width % size == 0 for width in widths)), None)
    if group is None:
        raise CheckpointError(
            f"rows of {', '.join(map(str, sorted(widths)))} values do not divide into groups of 32 or 128"
        )
    return group


def quantized_group(
    checkpoint: Checkpoint, name: str, scheme: Scheme, dtype: torch.dtype, inputs: Mapping[str, LayerInputs]
) -> Group:
    """The tensors of one linear layer, in the order in which one pass over its rows gives them.

    ``inputs``: of each layer as texts have them; empty where none were measured.
    """
    shape, stem = checkpoint.tensors[name].shape, name.removesuffix(".weight")
    tail: list[tuple[Entry, Callable[[], torch.Tensor]]] = []
    if scheme == "int4":
        group = int4_group(checkpoint)
        first = Entry(f"{stem}.weight_packed", torch.int32, (shape[0], shape[1] // 8))
        scale = Entry(f"{stem}.weight_scale", dtype, (shape[0], shape[1] // group))
        tail.append((Entry(f"{stem}.weight_shape", torch.int64, (2,)), lambda: torch.tensor(shape)))
    elif scheme == "nvfp4":
        if shape[1] % NVFP4_GROUP:
            raise CheckpointError(f"{name}: rows of {shape[1]} values do not divide into groups of 16")
        first = Entry(f"{stem}.weight_packed", torch.uint8, (shape[0], shape[1] // 2))
        scale = Entry(f"{stem}.weight_scale", torch.float8_e4m3fn, (shape[0], shape[1] // NVFP4_GROUP))
        entry = Entry(f"{stem}.weight_global_scale", torch.float32, (1,))
        tail.append((entry, lambda: torch.tensor([_whole(checkpoint, name)])))
    else:
        first, scale = Entry(name, STORED[scheme], shape), Entry(f"{name}_scale", dtype, (shape[0], 1))
        if scheme == "fp8-static":
            entry = Entry(f"{stem}.input_scale", torch.float32, (1,))
            tail.append((entry, lambda: torch.tensor([inputs[stem].largest / LARGEST[scheme]])))
    squares_C = inputs[stem].squares_C if stem in inputs else None

    def written() -> Blocks:
        error = ErrorSum()
        # Made at once: small tensors that stay would lie between the large ones that go, and the allocator
        # would take new memory for every block.
        scales = torch.empty(scale.shape, dtype=scale.dtype)
        whole = _whole(checkpoint, name) if scheme == "nvfp4" else 1.0
        start = 0
        for rows in blocks(checkpoint, name):
            if scheme == "int4":
                part = quantize_int4(rows, group=group, scale_dtype=dtype, input_squares_C=squares_C)
            elif scheme == "nvfp4":
                part = quantize_nvfp4(rows, whole=whole, input_squares_C=squares_C)
            else:
                part = quantize_rows(rows, scheme, scale_dtype=dtype)
            error.add(rows, part.restored_RC)
            scales[start : start + len(rows)] = part.scale
            start += len(rows)
            yield as_bytes(part.values.contiguous())
        yield as_bytes(scales)
        for _, make in tail:
            yield as_bytes(make())
        return {name: error.to_json()}

    return Group((first, scale, *(entry for entry, _ in tail)), written)


def _whole(checkpoint: Checkpoint, name: str) -> float:
    """NVFP4's factor of a tensor, so that the largest group scale is E4M3's largest number.

    Layers that vLLM joins into one matrix share it, hence the largest value of all of them.
    """
    stem, _, layer = name.removesuffix(".weight").rpartition(".")
    joined = next((layers for layers in FUSED if layer in layers), {layer})
    names = [f"{stem}.{other}.weight" for other in sorted(joined)]
    largest = max(
        float(torch.linalg.vector_norm(rows.float(), torch.inf))
        for other in names
        if other in checkpoint.tensors
        for rows in blocks(checkpoint, other)
    )
    return float(torch.tensor(448 * 6 / largest if largest else 1.0))


def quantization_config(scheme: Scheme, checkpoint: Checkpoint, *, ignored: list[str]) -> dict[str, Any]:
    """The entry of ``config.json`` that transformers and vLLM read."""
    weights: dict[str, Any] = {"symmetric": True, "dynamic": False}
    inputs: dict[str, Any] | None = None
    if scheme == "int4":
        weights |= {"num_bits": 4, "type": "int", "strategy": "group"}
        weights["group_size"] = int4_group(checkpoint)
    elif scheme == "nvfp4":
        weights |= {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": NVFP4_GROUP}
        weights["scale_dtype"] = weights["zp_dtype"] = "torch.float8_e4m3fn"
    else:
        kind = {"num_bits": 8, "type": "int" if scheme == "int8" else "float", "symmetric": True}
        weights |= kind | {"strategy": "channel"}
        static = {"strategy": "tensor", "dynamic": False}
        inputs = kind | (static if scheme == "fp8-static" else {"strategy": "token", "dynamic": True})
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[scheme],
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        },
    }
