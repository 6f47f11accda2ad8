"""A checkpoint with more tokens than it has: the vocabulary, and rows of embedding and output layer for them.

A new row is the mean of the rows of the tokens there are, so that a new token begins as likely as an ordinary
one (Hewitt 2021).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch

from nemotron4.checkpoint.interface import Checkpoint, OwnOrChosenFormat, RawTensor, row_ranges
from nemotron4.errors import ConfigError
from nemotron4.text.json_tokenizer import JsonTokenizer

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat

GROWING = ("model.embed_tokens.weight", "lm_head.weight")
MULTIPLE = 64  # of rows: what products and tensor parallelism divide well


class ExtendedCheckpoint(OwnOrChosenFormat):
    """The base with ``tokens`` behind its vocabulary. See ``interface.Checkpoint``."""

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
        self.base = base
        self._num_known = tokenizer.vocab_size
        self._tokenizer = _with_tokens(tokenizer, tokens, str(base.path))
        needed = self._tokenizer.vocab_size
        size = base.config.vocab_size
        self.num_rows = size if needed <= size else -(-needed // MULTIPLE) * MULTIPLE
        self.path, self.format, self.name = base.path, base.format, base.name
        self.config, self.notes = replace(base.config, vocab_size=self.num_rows), base.notes
        self.tensors = {
            name: replace(info, shape=(self.num_rows, *info.shape[1:])) if name in GROWING else info
            for name, info in base.tensors.items()
        }
        self.bos_token_id, self.adds_bos, self.eos_token_ids = (
            base.bos_token_id,
            base.adds_bos,
            base.eos_token_ids,
        )
        self._mean = cache(self._mean_row)

    def require_readable(self) -> None:
        self.base.require_readable()

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.read_rows(name, 0, self.tensors[name].shape[0], dtype)

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

    def own_format(self) -> PromptFormat | None:
        return self.base.prompt_format()


def _with_tokens(tokenizer: JsonTokenizer, tokens: Sequence[str], source: str) -> JsonTokenizer:
    spec = copy.deepcopy(tokenizer.specification)
    added = [
        {
            "id": tokenizer.vocab_size + place,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
        for place, token in enumerate(tokens)
    ]
    spec["added_tokens"] = [*(spec.get("added_tokens") or ()), *added]
    ends = [None if i is None else tokenizer.piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id)]
    return JsonTokenizer(spec, source=source, bos=ends[0], eos=ends[1])
