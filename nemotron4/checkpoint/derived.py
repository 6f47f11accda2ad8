"""Checkpoints made of another one: with more tokens, or with tensors that are in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from nemotron4.checkpoint.interface import Checkpoint, OwnOrChosenFormat, RawTensor, TensorInfo, row_ranges
from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat

GROWING = ("model.embed_tokens.weight", "lm_head.weight")
MULTIPLE = 64  # of rows: what products and tensor parallelism divide well


class DerivedCheckpoint(OwnOrChosenFormat):
    """All as the base has it but for the tensors, which a subclass reads. See ``interface.Checkpoint``."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.path, self.format, self.name = base.path, base.format, base.name
        self.config, self.notes = base.config, base.notes
        self.tensors: Mapping[str, TensorInfo] = base.tensors
        self.bos_token_id, self.adds_bos = base.bos_token_id, base.adds_bos
        self.eos_token_ids = base.eos_token_ids

    def require_readable(self) -> None:
        self.base.require_readable()

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.read_rows(name, 0, self.tensors[name].shape[0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        raise NotImplementedError

    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def own_format(self) -> PromptFormat | None:
        return self.base.prompt_format()


class ExtendedCheckpoint(DerivedCheckpoint):
    """The base with ``tokens`` behind its vocabulary, and rows of embedding and output layer for them.

    A new row is the mean of the rows there are, so that a new token begins as likely as an ordinary one
    (Hewitt 2021).
    """

    def __init__(self, base: Checkpoint, tokens: Sequence[str]) -> None:
        tokenizer = base.tokenizer()
        if not isinstance(tokenizer, JsonTokenizer):
            raise ConfigError(
                f"{base.path}: its vocabulary is not a tokenizer.json, to which tokens can be added",
                hint="convert the checkpoint to Hugging Face's form first",
            )
        known = [token for token in tokens if tokenizer.token_id(token) is not None]
        if known or len(set(tokens)) < len(tokens) or not all(tokens):
            raise ConfigError(
                f"new tokens {list(tokens)}: {known or 'one of them'} is there already, or empty"
            )
        super().__init__(base)
        self._num_known = tokenizer.vocab_size
        self._tokenizer = _with_tokens(tokenizer, tokens, str(base.path))
        needed = self._tokenizer.vocab_size
        size = base.config.vocab_size
        self.num_rows = size if needed <= size else -(-needed // MULTIPLE) * MULTIPLE
        self.config = replace(base.config, vocab_size=self.num_rows)
        self.tensors = {
            name: replace(info, shape=(self.num_rows, *info.shape[1:])) if name in GROWING else info
            for name, info in base.tensors.items()
        }
        self._mean = cache(self._mean_row)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in GROWING or stop <= self._num_known:
            return self.base.read_rows(name, start, stop, dtype)
        known = self.base.read_rows(name, start, max(start, self._num_known), dtype)
        new = self._mean(name).to(known.dtype)
        return torch.cat([known, new.expand(stop - start - len(known), -1)])

    def _mean_row(self, name: str) -> torch.Tensor:
        total = torch.zeros(self.tensors[name].shape[1], dtype=torch.float64)
        for start, stop in row_ranges(0, self._num_known, self.tensors[name].shape[1:]):
            total += self.base.read_rows(name, start, stop, torch.float32).double().sum(dim=0)
        return (total / self._num_known).float()

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor | None:
        return None if name in GROWING else self.base.raw_tensor(name, start, stop)

    def tokenizer(self) -> JsonTokenizer:
        return self._tokenizer


def _with_tokens(tokenizer: JsonTokenizer, tokens: Sequence[str], source: str) -> JsonTokenizer:
    spec = copy.deepcopy(tokenizer.specification)
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [
        {"id": tokenizer.vocab_size + place, "content": token, **plain} for place, token in enumerate(tokens)
    ]
    spec["added_tokens"] = [*(spec.get("added_tokens") or ()), *added]
    ends = [None if i is None else tokenizer.piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id)]
    return JsonTokenizer(spec, source=source, bos=ends[0], eos=ends[1])


class UpdatedCheckpoint(DerivedCheckpoint):
    """The base with ``changed`` in place of its own tensors: what a trainer has sent to a server."""

    def __init__(self, base: Checkpoint, changed: Mapping[str, torch.Tensor]) -> None:
        super().__init__(base)
        self._changed = changed
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
        self.tensors = {**base.tensors, **infos}

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name not in self._changed:
            return self.base.read_rows(name, start, stop, dtype)
        rows = self._changed[name][start:stop]
        return rows.clone() if dtype is None else rows.to(dtype, copy=True)

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor | None:
        return None if name in self._changed else self.base.raw_tensor(name, start, stop)
