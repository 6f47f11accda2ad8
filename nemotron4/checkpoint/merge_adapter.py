"""A checkpoint seen through a LoRA adapter: W + (alpha / rank) B A, merged while rows are read.

The product is accumulated in float32 and rounded once. An adapter of a reward model brings the head with it,
so the base may be the language model that it was trained on.

Legend: R = output rows, K = rank, C = input columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemotron4.checkpoint.blocks import read_rows
from nemotron4.checkpoint.interface import Checkpoint, TensorInfo
from nemotron4.checkpoint.nemo_adapter import is_nemo_adapter, read_nemo_lora
from nemotron4.checkpoint.safetensors import StoredTensor, read_header, read_tensor
from nemotron4.errors import CheckpointError
from nemotron4.model.adapter_files import HEAD_PREFIX, PEFT_PREFIX, WEIGHTS_FILE, read_adapter_config
from nemotron4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat


@dataclass(frozen=True)
class _Update:
    """The two factors of one weight's update, read when they are needed."""

    down_KC: Callable[[], torch.Tensor]
    up_RK: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _Lora:
    """An adapter: weight name -> its update, and the tensors of a reward head that it brings."""

    file: Path
    scale: float
    updates: Mapping[str, _Update]
    head: Mapping[str, StoredTensor] = field(default_factory=dict)


class MergedCheckpoint:
    """The base with the adapter in its weights. See ``interface.Checkpoint``."""

    def __init__(self, base: Checkpoint, path: Path) -> None:
        self._base = base
        self._lora = _nemo(path, base) if is_nemo_adapter(path) else _peft(path, base)
        self.path, self.format, self.name = base.path, base.format, base.name
        self.config, self.tensors, self.notes = base.config, base.tensors, base.notes
        if self._lora.head:
            self._put_head()
        self.bos_token_id, self.adds_bos, self.eos_token_ids = (
            base.bos_token_id,
            base.adds_bos,
            base.eos_token_ids,
        )

    def _put_head(self) -> None:
        """The head in place of the output layer, which a reward model does not have."""
        head = {
            name: TensorInfo(name, stored.shape, str(stored.dtype).removeprefix("torch."), self._lora.file)
            for name, stored in self._lora.head.items()
        }
        kept = {name: info for name, info in self.tensors.items() if name != "lm_head.weight"}
        self.tensors = kept | head
        self.config = replace(self.config, num_reward_attributes=head["reward_head.weight"].shape[0])

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.read_rows(name, 0, self.tensors[name].shape[0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name in self._lora.head:
            head = read_tensor(self._lora.file, self._lora.head[name])[start:stop]
            return head if dtype is None else head.to(dtype)
        rows_RC = read_rows(self._base, name, start, stop)
        update = self._lora.updates.get(name)
        stored = rows_RC.dtype
        if update is not None:
            up_RK, down_KC = update.up_RK()[start:stop].float(), update.down_KC().float()
            rows_RC = rows_RC.float().addmm_(up_RK, down_KC, alpha=self._lora.scale)
        return rows_RC.to(stored if dtype is None else dtype)

    def tokenizer(self) -> Tokenizer:
        return self._base.tokenizer()

    def prompt_format(self) -> PromptFormat | None:
        return self._base.prompt_format()


def adapter_hash(path: Path) -> str:
    """SHA-256 of the adapter's weights: whether two conversions merged the same."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _nemo(path: Path, base: Checkpoint) -> _Lora:
    lora = read_nemo_lora(path, base.config)
    for weight, (down_KC, up_RK) in lora.factors.items():
        _check(path, base, weight, tuple(up_RK.shape), tuple(down_KC.shape))
    updates = {
        weight: _Update(partial(_given, down_KC), partial(_given, up_RK))
        for weight, (down_KC, up_RK) in lora.factors.items()
    }
    return _Lora(path, lora.scale, updates)


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _peft(folder: Path, base: Checkpoint) -> _Lora:
    """Every tensor of the adapter belongs to a weight and fits it."""
    config = read_adapter_config(folder)
    if config.kind != "lora":
        raise CheckpointError(
            f"{folder}: a {config.kind} adapter cannot be merged into the weights; only LoRA is linear",
            hint="serve it beside the weights with --adapter",
        )
    file = folder / WEIGHTS_FILE
    stored = dict(read_header(file))
    head = {
        name.removeprefix(PEFT_PREFIX): stored.pop(name)
        for name in list(stored)
        if name.startswith(HEAD_PREFIX)
    }
    found: dict[str, _Update] = {}
    for name, down_KC in stored.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        up_RK = stored.get(name.replace(".lora_A.", ".lora_B."))
        if up_RK is None:
            raise CheckpointError(f"{file}: {module} has no lora_B")
        _check(file, base, f"{module}.weight", up_RK.shape, down_KC.shape)
        found[f"{module}.weight"] = _Update(
            partial(read_tensor, file, down_KC), partial(read_tensor, file, up_RK)
        )
    left = len(stored) - 2 * len(found)
    if not found or left:
        raise CheckpointError(f"{file}: {left} of {len(stored)} tensors are not LoRA factors")
    return _Lora(file, config.scale, found, head)


def _check(file: Path, base: Checkpoint, weight: str, up: tuple[int, ...], down: tuple[int, ...]) -> None:
    expected = base.tensors[weight].shape if weight in base.tensors else None
    if (up[0], down[-1]) != expected or up[1:] != down[:1]:
        what = f"do not make {list(expected)}" if expected else f"are of no weight of {base.path}"
        raise CheckpointError(
            f"{file}: {weight}: factors {list(up)} and {list(down)} {what}",
            hint="the adapter belongs to another model",
        )
