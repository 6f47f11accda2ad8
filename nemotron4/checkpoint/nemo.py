"""A NeMo checkpoint (zarr or torch_dist; directory or ``.nemo`` file) under Hugging Face names.

No pickle of it is ever loaded: ``common.pt`` and the extra states stay closed. Every tensor is checked
against the yaml before a weight is read, and every key is used or skipped on purpose.
"""

from __future__ import annotations

import json
import math
import posixpath
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemotron4.checkpoint.interface import (
    Format,
    OwnOrChosenFormat,
    TensorInfo,
    checked_tokenizer,
    end_token_ids,
    missing_template_note,
    prompt_format,
)
from nemotron4.checkpoint.nemo_config import (
    EMBEDDING,
    OUTPUT,
    REWARD_HEAD,
    RowSource,
    hugging_face_sources,
    model_config,
    nemo_parts,
    read_settings,
    tokenizer_file,
)
from nemotron4.checkpoint.nemo_files import (
    NemoFiles,
    NemoTensor,
    StoredChunk,
    open_nemo_files,
    read_rows_into,
    read_zarr_index,
)
from nemotron4.checkpoint.nemo_torch_dist import METADATA, read_torch_dist_index
from nemotron4.checkpoint.safetensors import StoredTensor, read_header
from nemotron4.errors import CheckpointError, TokenizerError
from nemotron4.model.config import ModelConfig
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.sentencepiece_tokenizer import SentencePieceTokenizer
from nemotron4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nemotron4.text.prompt import PromptFormat

WEIGHT_FOLDERS = ("model_weights", "weights")


def open_nemo(path: Path, *, name: str | None = None) -> NemoCheckpoint:
    """Read settings and index of a NeMo checkpoint; the weights stay on disk."""
    return NemoCheckpoint(open_nemo_files(path), name=name)


class NemoCheckpoint(OwnOrChosenFormat):
    """Implements ``checkpoint.interface.Checkpoint``, and reads ranges of rows."""

    format: Format = "nemo"

    def __init__(self, files: NemoFiles, *, name: str | None = None) -> None:
        self.path = files.source
        self.name = name or self.path.resolve().name.removesuffix(".nemo")
        self._files = files
        self._settings = read_settings(files)
        self._stored = read_nemo_index(files)
        self._tokenizer_file = tokenizer_file(self._settings, files)
        notes: list[str] = []
        self.config: ModelConfig = self._read_config(notes)
        self._sources = hugging_face_sources(self.config)
        self._check(notes)
        notes += missing_template_note(self.path, None, is_nemotron=True)
        self.notes = tuple(notes)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(
                name,
                source.shape,
                str(stored.dtype).removeprefix("torch."),
                self.path,
                math.prod(source.shape) * stored.dtype.itemsize,
            )
            for name, source in self._sources.items()
            for stored in [self._stored[source.key]]
        }

    @property
    def bos_token_id(self) -> int | None:
        return self._tokenizer.bos_id if self._tokenizer_file else None

    @property
    def adds_bos(self) -> bool:
        return False

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End of text, and the turn marker that ends an answer of the chat model."""
        if self._tokenizer_file is None:
            return ()
        own = self._tokenizer.eos_id
        declared = [] if own is None else [own]
        return end_token_ids(declared, self._tokenizer, is_nemotron=True, template=None)

    def require_readable(self) -> None:
        """Always."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.read_rows(name, 0, self._source(name).shape[0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of one tensor; nothing else of it is read."""
        source = self._source(name)
        stored = self._stored[source.key]
        index = () if source.layer is None else (source.layer,)
        columns = source.shape[1] if len(source.shape) == 2 else 1
        rows_RC = torch.empty((stop - start, columns), dtype=stored.dtype)
        position = 0  # row of the result at which the segment begins
        for first, last in source.rows:
            low, high = max(start, position), min(stop, position + last - first)
            if low < high:
                part_RC = rows_RC[low - start : high - start]
                read_rows_into(self._files, stored, index, first + low - position, part_RC)
            position += last - first
        rows = rows_RC if len(source.shape) == 2 else rows_RC[:, 0]
        return rows if dtype is None else rows.to(dtype)

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> None:
        return None

    def tokenizer(self) -> Tokenizer:
        return checked_tokenizer(self._tokenizer, self.config, self.path)

    def tokenizer_file(self) -> tuple[str, bytes]:
        """Name and content of the tokenizer as the checkpoint carries it."""
        if self._tokenizer_file is None:
            raise CheckpointError(
                f"{self.path}: the checkpoint carries no tokenizer",
                hint="copy its tokenizer file next to the yaml",
            )
        return posixpath.basename(self._tokenizer_file), self._files.read(self._tokenizer_file)

    def own_format(self) -> PromptFormat | None:
        return prompt_format(None, self.tokenizer, is_nemotron=True)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        name, data = self.tokenizer_file()
        source = f"{self.path}: {name}"
        if not name.endswith(".json"):
            return SentencePieceTokenizer(data, source=source)
        try:
            return JsonTokenizer(json.loads(data), source=source)
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{source}: not valid JSON: {error}") from error

    def _source(self, name: str) -> RowSource:
        try:
            return self._sources[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}") from None

    def _read_config(self, notes: list[str]) -> ModelConfig:
        embedding = self._stored.get(EMBEDDING)
        if embedding is None:
            raise CheckpointError(
                f"{self.path}: the index has no {EMBEDDING}; found {', '.join(sorted(self._stored)[:5])}"
            )
        vocab_size = rows = embedding.shape[0]
        if self._tokenizer_file is not None:
            pieces = self._tokenizer.vocab_size
            if pieces > rows:
                raise CheckpointError(
                    f"{self.path}: the tokenizer {self._tokenizer_file} has {pieces} pieces, "
                    f"the embedding only {rows} rows",
                    hint="the tokenizer belongs to another model",
                )
            vocab_size = pieces
        if vocab_size < rows:
            notes.append(f"{rows - vocab_size} padding rows of the vocabulary ({rows} stored) are left out.")
        reward = self._stored.get(REWARD_HEAD[0])
        return model_config(
            self._settings, vocab_size=vocab_size, num_reward_attributes=reward.shape[0] if reward else 0
        )

    def _check(self, notes: list[str]) -> None:
        """Every tensor that the yaml asks for is there with its shape, and nothing else."""
        parts = nemo_parts(self.config)
        for key, entries in parts.items():
            stored = self._stored.get(key)
            if stored is None:
                raise CheckpointError(
                    f"{self.path}: {key} is missing; {self._settings.where} asks for it",
                    hint="the checkpoint is incomplete; download it again",
                )
            name = entries[0][0].name
            rows = sum(part.stop - part.start for part in entries[0])
            is_stacked = name.startswith("model.layers.")
            expected = (*((len(entries),) if is_stacked else ()), rows, *self._sources[name].shape[1:])
            found = stored.shape
            if key in (EMBEDDING, OUTPUT) and len(found) == 2 and found[0] >= rows:
                found = (rows, *found[1:])
            if found != expected:
                raise CheckpointError(
                    f"{self.path}: {key} has shape {list(stored.shape)}; "
                    f"{self._settings.where} asks for {list(expected)}"
                )
        left = sorted(set(self._stored) - set(parts))
        if left == [OUTPUT] and (self.config.num_reward_attributes or self.config.tie_embeddings):
            notes.append(f"{OUTPUT} is left out: the model does not use it.")
        elif left:
            raise CheckpointError(
                f"{self.path}: the checkpoint has tensors that a Nemotron-4 model does not have: "
                f"{', '.join(left[:5])}"
            )


def read_nemo_index(files: NemoFiles) -> dict[str, NemoTensor]:
    """Every weight by its key without ``model.`` / ``module.``; optimizer and extra states are skipped."""
    folder = _weight_folder(files)
    backend = _backend(files, folder)
    readers = {
        "zarr": read_zarr_index,
        "torch_dist": read_torch_dist_index,
        "safetensors": read_safetensors_index,
    }
    index = readers[backend](files, folder)
    found: dict[str, NemoTensor] = {}
    for key, stored in index.items():
        short = key
        while short.startswith(("model.", "module.")):
            short = short.partition(".")[2]
        if short.startswith("optimizer.") or "_extra_state" in short:
            continue
        if short in found:
            raise CheckpointError(f"{files.source}: {key} and {found[short].key} are the same tensor")
        found[short] = stored
    return found


def read_safetensors_index(files: NemoFiles, folder: str) -> Mapping[str, NemoTensor]:
    """Megatron's tensors in safetensors files: one for each layer, stacked here as in the other forms."""
    plain: dict[str, NemoTensor] = {}
    layers: dict[str, dict[int, tuple[str, StoredTensor]]] = {}
    for file in (n for n in files.names if n.startswith(folder) and n.endswith(".safetensors")):
        for name, stored in read_header(files.source / file).items():
            if match := re.fullmatch(r"(.*\.layers)\.(\d+)\.(.+)", name):
                layers.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = file, stored
            else:
                start = (0,) * len(stored.shape)
                chunk = StoredChunk(start, stored.shape, stored.shape, file, stored.offset)
                plain[name] = NemoTensor(name, stored.shape, stored.dtype, (chunk,))
    for key, found in layers.items():
        shape, dtype = found[min(found)][1].shape, found[min(found)][1].dtype
        if sorted(found) != list(range(len(found))) or any(s.shape != shape for _, s in found.values()):
            raise CheckpointError(f"{files.source}: {key}: layers {sorted(found)} do not make one stack")
        chunks = tuple(
            StoredChunk((layer, *(0,) * len(shape)), (1, *shape), (1, *shape), file, stored.offset)
            for layer, (file, stored) in sorted(found.items())
        )
        plain[key] = NemoTensor(key, (len(found), *shape), dtype, chunks)
    return plain


def _weight_folder(files: NemoFiles) -> str:
    tops = {name.partition("/")[0] for name in files.names if "/" in name}
    for folder in WEIGHT_FOLDERS:
        if folder in tops:
            return folder
    if any("rank_" in top for top in tops) or any(name.endswith(".ckpt") for name in files.names):
        raise CheckpointError(
            f"{files.source}: the weights are Python pickles (model_weights.ckpt), which are not read",
            hint="convert them to a distributed checkpoint with NeMo first",
        )
    return ""


def _backend(files: NemoFiles, folder: str) -> str:
    prefix = f"{folder}/" if folder else ""
    name = f"{prefix}metadata.json"
    if name in files:
        try:
            backend = json.loads(files.read(name, limit_bytes=1024**2))["sharded_backend"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{files.source}: {name}: sharded_backend cannot be read") from error
    else:
        is_safetensors = any(n.startswith(prefix) and n.endswith(".safetensors") for n in files.names)
        backend = "safetensors" if is_safetensors else "zarr"
        backend = "torch_dist" if f"{prefix}{METADATA}" in files else backend
    if backend not in ("zarr", "torch_dist", "safetensors"):
        raise CheckpointError(
            f"{files.source}: sharded_backend is {backend!r}; expected 'zarr' or 'torch_dist'"
        )
    return str(backend)
