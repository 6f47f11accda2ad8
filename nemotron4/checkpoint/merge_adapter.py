"""A checkpoint seen through a LoRA adapter: W + (alpha / rank) B A, merged while rows are read.

The product is accumulated in float32 and rounded once. An adapter of a reward model brings the head with it,
so the base may be the language model that it was trained on.

Legend: R = output rows, K = rank, C = input columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemotron4.checkpoint.blocks import read_rows
from nemotron4.checkpoint.interface import Checkpoint, TensorInfo
from nemotron4.checkpoint.safetensors import StoredTensor, read_header, read_tensor
from nemotron4.errors import CheckpointError
from nemotron4.model.adapter_files import HEAD_PREFIX, PEFT_PREFIX, WEIGHTS_FILE, read_adapter_config
from nemotron4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat


@dataclass(frozen=True)
class _Update:
    """Where the two factors of one weight's update lie."""

    down_KC: StoredTensor
    up_RK: StoredTensor


class MergedCheckpoint:
    """The base with the adapter in its weights. See ``interface.Checkpoint``."""

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        config = read_adapter_config(folder)
        if config.kind != "lora":
            raise CheckpointError(
                f"{folder}: a {config.kind} adapter cannot be merged into the weights; only LoRA is linear",
                hint="P-tuning tables and bottleneck adapters run in training only, so far",
            )
        self._base = base
        self._file = folder / WEIGHTS_FILE
        self._scale = config.scale
        stored = dict(read_header(self._file))
        self._head = {
            name.removeprefix(PEFT_PREFIX): stored.pop(name)
            for name in list(stored)
            if name.startswith(HEAD_PREFIX)
        }
        self._updates = _updates(self._file, stored, base)
        self.path, self.format, self.name = base.path, base.format, base.name
        self.config, self.tensors, self.notes = base.config, base.tensors, base.notes
        if self._head:
            self._put_head()
        self.bos_token_id, self.adds_bos, self.eos_token_ids = (
            base.bos_token_id,
            base.adds_bos,
            base.eos_token_ids,
        )

    def _put_head(self) -> None:
        """The head in place of the output layer, which a reward model does not have."""
        head = {
            name: TensorInfo(name, stored.shape, str(stored.dtype).removeprefix("torch."), self._file)
            for name, stored in self._head.items()
        }
        kept = {name: info for name, info in self.tensors.items() if name != "lm_head.weight"}
        self.tensors = kept | head
        self.config = replace(self.config, num_reward_attributes=head["reward_head.weight"].shape[0])

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.read_rows(name, 0, self.tensors[name].shape[0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name in self._head:
            head = read_tensor(self._file, self._head[name])[start:stop]
            return head if dtype is None else head.to(dtype)
        rows_RC = read_rows(self._base, name, start, stop)
        update = self._updates.get(name)
        stored = rows_RC.dtype
        if update is not None:
            up_RK = read_tensor(self._file, update.up_RK)[start:stop].float()
            down_KC = read_tensor(self._file, update.down_KC).float()
            rows_RC = rows_RC.float().addmm_(up_RK, down_KC, alpha=self._scale)
        return rows_RC.to(stored if dtype is None else dtype)

    def tokenizer(self) -> Tokenizer:
        return self._base.tokenizer()

    def prompt_format(self) -> PromptFormat | None:
        return self._base.prompt_format()


def _updates(file: Path, stored: Mapping[str, StoredTensor], base: Checkpoint) -> Mapping[str, _Update]:
    """Weight name -> its factors; every stored tensor belongs to a weight and fits it."""
    found: dict[str, _Update] = {}
    for name, down_KC in stored.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        weight = f"{module}.weight"
        up_RK = stored.get(name.replace(".lora_A.", ".lora_B."))
        if weight not in base.tensors or up_RK is None:
            raise CheckpointError(
                f"{file}: {module} is not a weight of {base.path}, or has no lora_B",
                hint="the adapter belongs to another model",
            )
        shape = (up_RK.shape[0], down_KC.shape[-1])
        if shape != base.tensors[weight].shape or up_RK.shape[1:] != down_KC.shape[:1]:
            raise CheckpointError(
                f"{file}: {module}: factors {list(up_RK.shape)} and {list(down_KC.shape)} do not make "
                f"{list(base.tensors[weight].shape)}",
                hint="the adapter belongs to another model",
            )
        found[weight] = _Update(down_KC, up_RK)
    left = len(stored) - 2 * len(found)
    if not found or left:
        raise CheckpointError(f"{file}: {left} of {len(stored)} tensors are not LoRA factors")
    return found
