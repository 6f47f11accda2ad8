"""A checkpoint some of whose tensors are in memory: what a trainer has sent to a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nemotron4.checkpoint.interface import Checkpoint, OwnOrChosenFormat, RawTensor
from nemotron4.errors import CheckpointError
from nemotron4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat


class UpdatedCheckpoint(OwnOrChosenFormat):
    """The base with ``changed`` in place of its own tensors of those names. See ``interface.Checkpoint``."""

    def __init__(self, base: Checkpoint, changed: Mapping[str, torch.Tensor]) -> None:
        self.base, self._changed = base, changed
        infos = {}
        for name, tensor in changed.items():
            info = base.tensors.get(name)
            if info is None or info.shape != tuple(tensor.shape):
                expected = "no tensor of that name" if info is None else f"shape {list(info.shape)}"
                raise CheckpointError(
                    f"{base.path} has {expected}; {name} with shape {list(tensor.shape)} was sent",
                    hint="start trainer and server from one model",
                )
            kind = str(tensor.dtype).removeprefix("torch.")
            infos[name] = replace(info, dtype=kind, num_bytes=tensor.nbytes)
        self.path, self.format, self.name = base.path, base.format, base.name
        self.config, self.notes = base.config, base.notes
        self.tensors = {**base.tensors, **infos}
        self.bos_token_id, self.adds_bos, self.eos_token_ids = (
            base.bos_token_id,
            base.adds_bos,
            base.eos_token_ids,
        )

    def require_readable(self) -> None:
        self.base.require_readable()

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.read_rows(name, 0, self.tensors[name].shape[0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self._changed:
            return self.base.read_rows(name, start, stop, dtype)
        rows = self._changed[name][start:stop]
        return rows.clone() if dtype is None else rows.to(dtype, copy=True)

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor | None:
        return None if name in self._changed else self.base.raw_tensor(name, start, stop)

    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def own_format(self) -> PromptFormat | None:
        return self.base.prompt_format()
