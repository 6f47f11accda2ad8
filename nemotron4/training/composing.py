"""The adapter that a run leaves, relative to the original base also when the run started from an adapter.

One that trains on (``continue``) stays what it is. Of LoRA on LoRA the sum of both updates is one LoRA of the
summed ranks, exactly; with ``compose_rank`` it is cut by a singular value decomposition, and what that leaves
out is said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nemotron4.checkpoint.adapter_base import base_name, base_of, write_base, write_format
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint
from nemotron4.errors import ConfigError
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapter_files import (
    CONFIG_FILE,
    PEFT_PREFIX,
    WEIGHTS_FILE,
    read_adapter_config,
    write_adapter,
)

Factors = dict[str, tuple[Tensor, Tensor]]  # module -> A (rank, in), B (out, rank) with the scale in it


def check_composable(base: Checkpoint, config: AdapterConfig | None) -> None:
    """ConfigError, before training, for an adapter on an adapter that cannot be written as one."""
    if config is not None and config.compose == "continue":
        _check_continuable(base, config)
        return
    if config is None or not isinstance(base, MergedCheckpoint) or config.compose == "stack":
        return
    start = base.adapter_path
    is_lora = (start / CONFIG_FILE).is_file() and read_adapter_config(start).kind == "lora"
    is_linear = is_lora and not read_adapter_config(start).use_dora and not config.use_dora
    if config.kind != "lora" or not is_linear:
        raise ConfigError(
            f"the start has the adapter {start}, and with an adapter of kind {config.kind} on it the two are "
            "no single LoRA",
            hint='set adapter.compose = "stack": the new adapter is then kept on top of the other one',
        )


def _check_continuable(base: Checkpoint, config: AdapterConfig) -> None:
    if not isinstance(base, MergedCheckpoint) or not (base.adapter_path / CONFIG_FILE).is_file():
        raise ConfigError(
            'adapter.compose = "continue" trains an adapter in PEFT\'s format on, and the start has none',
            hint="name it in model.adapter",
        )
    found = read_adapter_config(base.adapter_path)
    if found.kind != "lora" or found.use_dora or found.modules_to_save:
        raise ConfigError(
            f"{base.adapter_path} is no plain LoRA, which alone can train on",
            hint='leave adapter.compose out, or set it to "stack"',
        )
    if _shape(config) != _shape(found):
        raise ConfigError(
            f"{base.adapter_path} trains on as it is, and [adapter] describes another",
            hint=f"set {_as_settings(found)}",
        )


def _as_settings(found: AdapterConfig) -> str:
    said = f'kind = "lora", rank = {found.rank}, alpha = {found.alpha}'
    said += ", use_rslora = true" if found.use_rslora else ""
    for name in ("rank_pattern", "alpha_pattern"):
        if entries := getattr(found, name):
            said += f", {name} = {{ {', '.join(f'{json.dumps(key)} = {n}' for key, n in entries.items())} }}"
    return f"{said}, targets = {json.dumps(list(found.target_names))}"


def _shape(config: AdapterConfig) -> tuple[object, ...]:
    pattern = list(config.rank_pattern.items()), list(config.alpha_pattern.items())
    saved = config.use_dora, config.modules_to_save, config.use_rslora and any(pattern), *pattern
    return config.kind, config.rank, config.scale, sorted(config.target_names), *saved


def trains_on(base: Checkpoint, config: AdapterConfig | None) -> MergedCheckpoint | None:
    """The start, if it is its adapter that trains; None if that stays in the weights, or there is none."""
    is_continued = config is not None and config.compose == "continue"
    return base if is_continued and isinstance(base, MergedCheckpoint) else None


def trained_before(start: MergedCheckpoint) -> dict[str, Tensor]:
    """The tensors of the start's adapter, float32, by their names in the model."""
    tensors = load_file(start.adapter_path / WEIGHTS_FILE)
    return {name.removeprefix(PEFT_PREFIX): tensor.float() for name, tensor in tensors.items()}


def write_result(
    folder: Path,
    tensors: dict[str, Tensor],
    config: AdapterConfig,
    base: Checkpoint,
    start: str,
    note: Callable[[str], None],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a run's adapter with a record of its base and the format that it was trained in."""
    folder.mkdir(parents=True, exist_ok=True)
    write_format(folder, base)
    if not isinstance(base, MergedCheckpoint):
        name = base_name(start)
        write_adapter(folder, _in_type(tensors, dtype), config, base=name)
        write_base(folder, base, name, {})
        return
    below = base.adapter_path
    if config.compose == "continue":
        name = base_of(below)
        write_adapter(folder, _in_type(tensors, dtype), config, base=name)
        write_base(folder, base.base, name, {"compose": "continue"})
        return
    if config.compose == "stack":
        name = str(below.absolute())
        write_adapter(folder, _in_type(tensors, dtype), config, base=name)
        write_base(folder, base, name, {"compose": "stack"})
        note(f"the adapter works on top of {below}")
        return
    made, rank, error = composed(below, tensors, config)
    name = base_of(below)
    saved = dict.fromkeys((*read_adapter_config(below).modules_to_save, *config.modules_to_save))
    whole = replace(
        config.of(""), rank=rank, alpha=float(rank), use_rslora=False, modules_to_save=tuple(saved)
    )
    write_adapter(folder, _in_type(made, dtype), whole, base=name)
    write_base(folder, base.base, name, {"compose": "merge", "rank": rank, "relative_error": error})
    note(f"the adapter has rank {rank} and holds this run's and that of {below}, relative error {error:.1e}")


def _in_type(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def composed(
    below: Path, tensors: Mapping[str, Tensor], config: AdapterConfig
) -> tuple[dict[str, Tensor], int, float]:
    """One LoRA of both updates: its tensors, its rank, and the relative error of the cut (Frobenius norm)."""
    old = load_file(below / WEIGHTS_FILE)
    parts = [_factors(old, read_adapter_config(below)), _factors(tensors, config)]
    joined: Factors = {}
    for module in dict.fromkeys(name for part in parts for name in part):
        pairs = [part[module] for part in parts if module in part]
        joined[module] = (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1))
    widest = max(a.shape[0] for a, _ in joined.values())
    rank = min(config.compose_rank or widest, widest)
    kept = dropped = 0.0
    made = {name: value for name, value in old.items() if ".lora_" not in name}
    made |= {name: value for name, value in tensors.items() if ".lora_" not in name}
    for module, (down, up) in joined.items():
        if down.shape[0] > rank:
            down, up, lost, whole = _cut(down, up, rank)
            dropped, kept = dropped + lost, kept + whole - lost
        missing = rank - down.shape[0]
        down = torch.cat([down, down.new_zeros(missing, down.shape[1])])
        up = torch.cat([up, up.new_zeros(up.shape[0], missing)], dim=1)
        made[f"{PEFT_PREFIX}{module}.lora_A.weight"] = down.float()
        made[f"{PEFT_PREFIX}{module}.lora_B.weight"] = up.float()
    return made, rank, (dropped / (dropped + kept)) ** 0.5 if dropped else 0.0


def _factors(tensors: Mapping[str, Tensor], config: AdapterConfig) -> Factors:
    found = {}
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
            found[module] = (down.cpu().double(), config.of(module).scale * up.cpu().double())
    return found


def _cut(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The best factors of a lower rank, and the squared norms of what is lost and of the whole."""
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    root = s[:rank].sqrt()
    squares = s.square()
    new_up = left @ (u[:, :rank] * root)
    new_down = (root[:, None] * vh[:rank]) @ right.T
    return new_down, new_up, float(squares[rank:].sum()), float(squares.sum())
