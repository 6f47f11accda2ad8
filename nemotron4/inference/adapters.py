"""LoRA adapters next to one base: each row of a step is computed with the adapter that its request names.

Nothing is merged. The update of an adapter is computed for its own rows alone, so that a request's tokens
are the same in any batch. An adapter that is unloaded lives on until the last request with it has ended.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.errors import CheckpointError, ConfigError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

_numbers = itertools.count(1)


class Factors(NamedTuple):
    """What is added to one weight: scale B A."""

    scale: float
    down_KC: Tensor  # A
    up_RK: Tensor  # B


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """``salt`` keeps its keys and values apart from those of every other adapter in the prefix cache."""

    name: str
    salt: bytes


class AdapterBank(ABC):
    """The adapters of one model, by name; any thread may load and unload."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._loaded: dict[str, LoadedAdapter] = {}

    @abstractmethod
    def read(self, name: str, salt: bytes, factors: Mapping[str, Factors], path: str | Path) -> LoadedAdapter:
        """As what computes the model needs it; ``no_place`` for a weight that nothing can be added to."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._loaded)

    def load(self, name: str, path: str | Path, *, force: bool = False) -> None:
        """CheckpointError if it is of another model or more than LoRA; ConfigError for a taken name."""
        if name in self._loaded:
            raise ConfigError(f"an adapter {name!r} is loaded already", hint="unload it first")
        factors = lora_factors(Path(path), self._checkpoint, force=force)
        self._loaded[name] = self.read(name, next(_numbers).to_bytes(8, "big"), factors, path)

    def unload(self, name: str) -> None:
        if self._loaded.pop(name, None) is None:
            raise ConfigError(f"no adapter {name!r} is loaded", hint=f"loaded: {self._shown()}")

    def __getitem__(self, name: str) -> LoadedAdapter:
        found = self._loaded.get(name)
        if found is None:
            raise RequestError(f"no adapter {name!r} is loaded", hint=f"loaded: {self._shown()}")
        return found

    def _shown(self) -> str:
        return ", ".join(self._loaded) or "none"


def no_place(path: str | Path, weight: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {weight} cannot be adapted next to the base", hint="merge it: --adapter PATH without a name"
    )


def lora_factors(path: Path, base: Checkpoint, *, force: bool = False) -> dict[str, Factors]:
    """By the name of the weight. PyTorch reads them."""
    from safetensors.torch import load_file

    from nemotron4.checkpoint.merge_adapter import MergedCheckpoint, is_nemo_adapter, read_nemo_lora
    from nemotron4.model.adapter_config import AdapterConfig
    from nemotron4.model.adapter_files import (
        IA3,
        PEFT_PREFIX,
        WEIGHTS_FILE,
        adapter_type,
        has_reward_head,
        read_adapter_config,
    )

    merged = MergedCheckpoint(base, path, force=force)  # refuses what is of another base or has no place
    if merged.prompt_format() != base.prompt_format():
        raise CheckpointError(
            f"{path}: trained in another prompt format than the base's, which all requests are written in",
            hint="serve it alone: --adapter PATH without a name",
        )
    if is_nemo_adapter(path):
        lora = read_nemo_lora(path, base.config)
        return {weight: Factors(lora.scale, *pair) for weight, pair in lora.factors.items()}
    is_ia3 = adapter_type(path) == IA3
    config = AdapterConfig(kind="lora") if is_ia3 else read_adapter_config(path)
    if is_ia3 or config.use_dora or config.modules_to_save or has_reward_head(path):
        raise CheckpointError(
            f"{path}: more than LoRA (DoRA, (IA)3, modules_to_save, a reward head): merged only",
            hint="--adapter PATH without a name merges it into the weights",
        )
    tensors = load_file(path / WEIGHTS_FILE)
    found: dict[str, Factors] = {}
    for name, down_KC in tensors.items():
        if name.endswith(".lora_A.weight"):
            weight = name.removeprefix(PEFT_PREFIX).replace(".lora_A.", ".")
            scale = config.of(weight.removesuffix(".weight")).scale
            found[weight] = Factors(scale, down_KC, tensors[name.replace(".lora_A.", ".lora_B.")])
    return found
