"""From an opened checkpoint into a module: every tensor loaded or skipped on purpose, exactly once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.match import check_shapes, check_tied_values, configured_tie, skip_reason
from nemotron4.model.attention import RotaryEmbedding
from nemotron4.model.config import ModelConfig
from nemotron4.model.reward_head import RewardModel
from nemotron4.model.transformer import Block, Transformer

READERS = 2  # tensors read and dequantised at the same time, while the caller works on those before


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor. ``loaded`` and ``skipped`` together are all names of both sides."""

    loaded: tuple[str, ...]
    skipped: Mapping[str, str]  # name -> reason


class _WithoutInitialisation(TorchFunctionMode):
    """Makes ``torch.nn.init`` do nothing: on the meta device it imports torch's compiler, for a second."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def meta_module(config: ModelConfig) -> Transformer | RewardModel:
    """The model without memory for its weights."""
    with torch.device("meta"), _WithoutInitialisation():
        return RewardModel(config) if config.num_reward_attributes else Transformer(config)


def load_transformer(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    block_loaded: Callable[[Block], None] | None = None,
) -> tuple[Transformer, LoadReport]:
    """The checkpoint's language model, ready to run, and what became of every tensor.

    ``block_loaded`` is called with each block when its weights are in it, while the next are read.
    """
    model = meta_module(replace(checkpoint.config, num_reward_attributes=0))
    assert isinstance(model, Transformer)
    last_names = {
        f"model.layers.{i}.{list(block.state_dict())[-1]}": block
        for i, block in enumerate(model.model.blocks())
    }

    def loaded(name: str) -> None:
        if block_loaded is not None and name in last_names:
            block_loaded(last_names[name])

    report = load_weights(model, checkpoint, dtype=dtype, device=device, loaded=loaded)
    model.model.rotary = RotaryEmbedding(checkpoint.config).to(device)  # not in a checkpoint: computed
    return model.eval(), report


def load_weights(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    skip: Mapping[str, str] | None = None,
    loaded: Callable[[str], None] = lambda name: None,
) -> LoadReport:
    """Replace the parameters of ``module`` (usually on the meta device) by the checkpoint's.

    ``skip`` names tensors, of the checkpoint or of the module, that are left alone on purpose, with the
    reason: a reward head that the checkpoint does not have, an output layer that the module does not have.
    ``loaded`` is called with each name, in the module's order, when the tensor is in the module.
    Names and shapes are all checked before the first weight is read. Peak memory is the module plus a
    few tensors as stored. Raises CheckpointError naming the tensor and the file.
    """
    wanted, tied, skipped = _match(module, checkpoint, dict(skip or {}))
    old_tensors = {name: slot[2] for name, slot in wanted.items() if name not in tied}
    users: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for owner, attribute, old in wanted.values():
        users.setdefault(id(old), []).append((owner, attribute))
    # ``loaded`` may replace modules, whose weights must then go: no reference to one stays here.
    del owner, wanted

    def read(name: str) -> torch.Tensor:
        is_float = old_tensors[name].is_floating_point()
        return checkpoint.read(name, dtype if is_float else None).to(device)

    for name, new in _read_ahead(read, old_tensors):
        old = old_tensors[name]
        if isinstance(old, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
        for owner, attribute in users.pop(id(old)):
            setattr(owner, attribute, new)
        del owner, new
        loaded(name)
    for name, source in tied.items():
        skipped[name] = f"the same weight as {source}"
    return LoadReport(tuple(old_tensors), skipped)


def match_weights(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    *,
    skip: Mapping[str, str] | None = None,
    compare_tied: bool = True,
) -> tuple[str, ...]:
    """The checks of ``load_weights``, no loading: the names that the module takes, a tied weight once.

    Only a second copy of a tied weight is read, if ``compare_tied``.
    """
    wanted, tied, _ = _match(module, checkpoint, dict(skip or {}), compare_tied=compare_tied)
    return tuple(name for name in wanted if name not in tied)


_Slot = tuple[torch.nn.Module, str, torch.Tensor]


def _match(
    module: torch.nn.Module, checkpoint: Checkpoint, skipped: dict[str, str], *, compare_tied: bool = True
) -> tuple[dict[str, _Slot], dict[str, str], dict[str, str]]:
    """The slots to fill, which of them share a weight with an earlier one, and what is skipped and why."""
    checkpoint.require_readable()
    slots = _slots(module)
    for name in checkpoint.tensors:
        if name not in slots and name not in skipped and (reason := skip_reason(name, checkpoint)):
            skipped[name] = reason
    for name in skipped.keys() - slots.keys() - checkpoint.tensors.keys():
        raise ValueError(f"skip names {name!r}, which neither the module nor the checkpoint has")
    wanted = {name: slot for name, slot in slots.items() if name not in skipped}
    tied = _tied_names(wanted)
    shapes = {name: tuple(tensor.shape) for name, (_, _, tensor) in wanted.items()}
    check_shapes(shapes, checkpoint, skipped, tied)
    if compare_tied:
        check_tied_values(checkpoint, {**tied, **configured_tie(checkpoint)})
    return wanted, tied, skipped


def _read_ahead(
    read: Callable[[str], torch.Tensor], names: Iterable[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each name with its tensor, in order; a few tensors are read before they are asked for, no more."""
    waiting: deque[tuple[str, Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(max_workers=READERS) as pool:
        for name in names:
            waiting.append((name, pool.submit(read, name)))
            if len(waiting) > 2 * READERS:
                yield waiting[0][0], waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].result()


def _slots(module: torch.nn.Module) -> dict[str, _Slot]:
    """Every name of the state dict, with the module and attribute that hold it."""
    names = module.state_dict(keep_vars=True)
    found: dict[str, _Slot] = {}
    for name, tensor in names.items():
        prefix, _, attribute = name.rpartition(".")
        found[name] = (module.get_submodule(prefix), attribute, tensor)
    return found


def _tied_names(slots: Mapping[str, _Slot]) -> dict[str, str]:
    """Names that share their parameter with an earlier name -> that name."""
    first: dict[int, str] = {}
    return {
        name: first[id(slot[2])]
        for name, slot in slots.items()
        if first.setdefault(id(slot[2]), name) != name
    }
