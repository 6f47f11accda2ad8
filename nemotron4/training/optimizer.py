"""AdamW, with moments of 32 bits, of 8 through torchao, or of 32 in main memory next to a GPU.

Eight bits are the blockwise dynamic quantisation of Dettmers et al., "8-bit Optimizers via Block-wise
Quantization" (2022): 256 numbers share a scale; a weight of fewer than 4,096 numbers keeps 32 bits.
Offloaded moments are as in Ren et al., "ZeRO-Offload" (2021): the processor makes the update. torchao's own
form takes the gradients before they are clipped, and FSDP2's needs a process group.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemotron4.errors import ConfigError, TrainingError, import_optional
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.recipe import OptimizerSection

# Of one trained number, where the model is: two moments of 32 bits, or of 8 with their share of the scales.
MOMENT_BYTES = {"float32": 8.0, "8bit": 2 * (1 + 4 / 256), "offloaded": 0.0}
OFFLOADED_BYTES = 12  # in main memory: the moments and a copy of the weight


class ClippingAdamW(torch.optim.AdamW):
    """torch's fused AdamW. Its next step divides gradients by ``grad_scale`` as it reads them, so that
    clipping is no pass over memory of its own.
    """

    grad_scale: Tensor | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step()
        self.grad_scale = None


class Joined(torch.optim.Optimizer):
    """Optimisers of different parameters as one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        # Theirs, not copies of them.
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
            self.state.update(part.state)


class Offloaded(torch.optim.Optimizer):
    """AdamW on copies of the weights in main memory: gradients go there, new weights come back."""

    grad_scale: Tensor | None = None  # as ClippingAdamW's

    def __init__(self, parameters: Mapping[str, nn.Parameter], settings: OptimizerSection) -> None:
        self._copies = {p: nn.Parameter(p.detach().to("cpu", copy=True)) for p in parameters.values()}
        named = {name: self._copies[p] for name, p in parameters.items()}
        self._own = _adamw(named, settings)
        super().__init__(list(parameters.values()), {})
        self.param_groups = self._own.param_groups  # whose rate is set

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter, copy in self._copies.items():
            copy.copy_(parameter)  # a checkpoint may have been read into it
            copy.grad = None if parameter.grad is None else parameter.grad.to("cpu")
        self._own.grad_scale = None if self.grad_scale is None else self.grad_scale.to("cpu")
        self._own.step()
        self.grad_scale = None
        for parameter, copy in self._copies.items():
            parameter.copy_(copy)
            self.state[parameter] = self._own.state[copy]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._own.zero_grad(set_to_none)
        for parameter in self._copies:
            parameter.grad = None


def build_optimizer(
    trainable: Mapping[str, nn.Parameter], settings: OptimizerSection
) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms and biases do not.

    Of moments in eight bits, embeddings and output layer keep 32: most of their rows have no gradient in a
    step, and next to a large one a small second moment becomes zero, which makes its update unbounded.
    """
    if not trainable:
        raise ConfigError("the model has no parameter that trains")
    if settings.moments == "offloaded":
        return Offloaded(trainable, settings)
    wide = {name: p for name, p in trainable.items() if settings.moments == "float32" or _is_by_token(name)}
    narrow = {name: p for name, p in trainable.items() if name not in wide}
    parts: list[torch.optim.Optimizer] = []
    if wide:
        parts.append(_adamw(wide, settings))
    if narrow:
        # They warn of CUDA libraries that this build of torch cannot load, and of each other's interfaces.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching", category=UserWarning)
        library = import_optional("torchao.optim", 'optimizer.moments = "8bit"')
        parts.append(library.AdamW8bit(_groups(narrow, settings), **_options(settings)))
    return parts[0] if len(parts) == 1 else Joined(parts)


def _adamw(parameters: Mapping[str, nn.Parameter], settings: OptimizerSection) -> ClippingAdamW:
    # One pass over memory for the whole update: half the time of the plain form on a CPU.
    return ClippingAdamW(_groups(parameters, settings), fused=True, **_options(settings))


def _options(settings: OptimizerSection) -> dict[str, Any]:
    return {"lr": settings.learning_rate, "betas": tuple(settings.betas), "eps": settings.eps}


def _is_by_token(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name


def _groups(parameters: Mapping[str, nn.Parameter], settings: OptimizerSection) -> list[dict[str, Any]]:
    groups: dict[Any, dict[str, Any]] = {}
    for parameter in parameters.values():
        # One fused call works on parameters of one layout.
        layout = parameter.device_mesh if isinstance(parameter, DTensor) else None
        decay = settings.weight_decay if parameter.dim() >= 2 else 0.0
        group = groups.setdefault((layout, decay), {"params": [], "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def finite_norm(engine: TrainingEngine, step: int, name: str = "gradient") -> float:
    """The norm of all gradients; TrainingError for one that no update can be made of."""
    norm = engine.grad_norm()
    if not math.isfinite(norm):
        raise TrainingError(
            f"the {name}'s norm is {norm} at step {step}; no update was made",
            hint="lower its learning_rate, or resume from the last checkpoint with other data",
        )
    return norm


def apply_gradients(
    engine: TrainingEngine, optimizer: torch.optim.Optimizer, norm: float, rate: float, clip_norm: float
) -> None:
    """One update by the gradients that the parameters hold, cut to ``clip_norm`` (0: not), then none left."""
    if clip_norm and norm > clip_norm:
        trained = [p for p in engine.trainable.values() if p.grad is not None]
        is_whole = not any(isinstance(parameter, DTensor) for parameter in trained)
        if isinstance(optimizer, ClippingAdamW | Offloaded) and is_whole:
            optimizer.grad_scale = torch.tensor(norm / clip_norm, device=engine.device)
        else:
            for parameter in trained:
                assert parameter.grad is not None
                parameter.grad.mul_(clip_norm / norm)
    _step(optimizer, rate)


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao compiles its step around one tensor
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def moments(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """AdamW's state under flat names, the same under every layout; what has made no step yet is zeros."""
    if not all(optimizer.state[parameter] for parameter in parameters.values()):
        _make_state(parameters, optimizer)
    for name, parameter in parameters.items():
        state: dict[str, Any] = optimizer.state[parameter]
        for key in ("exp_avg", "exp_avg_sq", "step"):
            value = state[key]
            if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):
                for part in value.__tensor_flatten__()[0]:  # torchao's codes, scales and their map
                    yield f"{key}.{part}.{name}", getattr(value, part)
            else:
                yield f"{key}.{name}", value


def _make_state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Zeros, as the optimiser itself would make them."""
    if isinstance(optimizer, torch.optim.AdamW):
        for parameter in parameters.values():
            state = optimizer.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        return
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    _step(optimizer, 0.0)
    for parameter in parameters.values():
        optimizer.state[parameter]["step"].zero_()
