"""How a decoder's weights are split over a tensor-parallel mesh, declared in one place.

Column-parallel layers (q, k, v, gate, up) split their outputs, row-parallel ones (o, down) their inputs; the
embedding and the output layer split the vocabulary; norms and the reward head are kept whole. LoRA's A and B
follow their base layer: column: A whole, B split by rows; row: A split by columns, B whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from nemotron4.errors import ConfigError
from nemotron4.model.adapters import BottleneckLinear, LoraLinear, PromptEmbedding
from nemotron4.model.config import ModelConfig

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")


def check_divisible(config: ModelConfig, size: int) -> None:
    """ConfigError if heads, feed-forward rows or vocabulary do not split evenly."""
    for name in ("num_kv_heads", "ffn_hidden_size", "vocab_size"):
        value = getattr(config, name)
        if value % size:
            divisors = [
                n
                for n in range(1, size + 1)
                if all(
                    getattr(config, other) % n == 0
                    for other in ("num_kv_heads", "ffn_hidden_size", "vocab_size")
                )
            ]
            raise ConfigError(
                f"{name} ({value}) is not divisible by parallel.tensor: {size}",
                hint=f"use {', '.join(map(str, divisors))}",
            )


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Split the linear layers and the embedding of ``net`` over a one-axis mesh, in place.

    Every process holds the same full weights before. A tied weight stays tied.
    """
    done: dict[int, nn.Parameter] = {}
    for name, module in list(net.named_modules()):
        leaf = name.rsplit(".", 1)[-1]
        if isinstance(module, nn.Linear) and leaf in (*COLUMN, *ROW):
            _split_linear(module, mesh, is_column=leaf in COLUMN)
        elif isinstance(module, nn.Embedding) and leaf == "embed_tokens":
            if isinstance(module, PromptEmbedding):
                raise ConfigError("P-tuning runs without tensor parallelism", hint="set parallel.tensor = 1")
            _set(module, "weight", mesh, Shard(0), done)
            _hook(module, mesh, Replicate(), Replicate())
        elif isinstance(module, nn.Linear) and leaf == "lm_head":
            # Used by its weight alone: the loss is computed on vocabulary shards.
            _set(module, "weight", mesh, Shard(0), done)


def _split_linear(module: nn.Linear, mesh: DeviceMesh, *, is_column: bool) -> None:
    _set(module, "weight", mesh, Shard(0) if is_column else Shard(1))
    if module.bias is not None:
        _set(module, "bias", mesh, Shard(0) if is_column else Replicate())
    if isinstance(module, LoraLinear):
        _set(module.lora_A, "weight", mesh, Replicate() if is_column else Shard(1))
        _set(module.lora_B, "weight", mesh, Shard(0) if is_column else Replicate())
    elif isinstance(module, BottleneckLinear):
        for part in (module.adapter_norm, module.adapter_down, module.adapter_up):
            for name in dict(part.named_parameters(recurse=False)):
                _set(part, name, mesh, Replicate())
    if is_column:
        _hook(module, mesh, Replicate(), Shard(-1))
    else:
        _hook(module, mesh, Shard(-1), Replicate())


def _set(
    module: nn.Module,
    name: str,
    mesh: DeviceMesh,
    placement: Placement,
    done: dict[int, nn.Parameter] | None = None,
) -> None:
    old = getattr(module, name)
    known = {} if done is None else done
    if id(old) not in known:
        # No broadcast: every process has loaded the same weights.
        split = distribute_tensor(old.detach(), mesh, [placement], src_data_rank=None)
        known[id(old)] = nn.Parameter(split, requires_grad=old.requires_grad)
    setattr(module, name, known[id(old)])


def _hook(module: nn.Module, mesh: DeviceMesh, inner: Placement, outer: Placement) -> None:
    """Plain local tensors outside the module, distributed ones inside."""

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (DTensor.from_local(arguments[0], mesh, [inner], run_check=False), *arguments[1:])

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Tensor:
        local: Tensor = output.redistribute(mesh, [outer]).to_local()
        return local

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def settle_gradients(parameters: dict[str, nn.Parameter]) -> None:
    """Add up gradients that are still spread as partial sums over the mesh of a whole parameter."""
    for parameter in parameters.values():
        gradient = parameter.grad
        if (
            isinstance(gradient, DTensor)
            and isinstance(parameter, DTensor)
            and gradient.placements != parameter.placements
        ):
            parameter.grad = gradient.redistribute(parameter.device_mesh, parameter.placements)


def total_norm(gradients: list[Tensor]) -> float:
    """Euclidean norm over gradients of any layouts: one collective for each layout."""
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        groups.setdefault(key, []).append(gradient)
    squares = 0.0
    for group in groups.values():
        norm = torch.nn.utils.get_total_norm(group)
        squares += float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
    return float(squares**0.5)
