"""Hugging Face directories: config.json, safetensors (one file or shards), tokenizer files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron4.checkpoint.hf_config import model_config
from nemotron4.checkpoint.interface import (
    PLAIN,
    Format,
    OwnOrChosenFormat,
    RawTensor,
    TensorInfo,
    checked_tokenizer,
    end_token_ids,
    missing_template_note,
    prompt_format,
)
from nemotron4.checkpoint.quantized import (
    Place,
    QuantizedWeight,
    find_quantization,
    quantized_weights,
    require_expandable,
)
from nemotron4.checkpoint.safetensors import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    read_bytes,
    read_header,
    read_json,
    read_rows,
    rows_of,
)
from nemotron4.errors import CheckpointError, unknown_name
from nemotron4.model.config import ModelConfig
from nemotron4.text.tokenizer import Tokenizer
from nemotron4.text.tokenizer_files import open_tokenizer, read_chat_template

if TYPE_CHECKING:
    import torch

    from nemotron4.checkpoint.dcp import DcpTensor
    from nemotron4.text.prompt import PromptFormat


class HuggingFaceCheckpoint(OwnOrChosenFormat):
    """A directory as ``save_pretrained`` writes it. See ``interface.Checkpoint``."""

    format: Format = "huggingface"

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.resolve().name
        self._values = read_json(path / "config.json")
        self.config: ModelConfig
        self.config, config_notes = model_config(self._values, path / "config.json")
        self.quantization = find_quantization(self._values, path)
        self._files: dict[str, Place] = {}
        index_notes: list[str] = []
        self._assembled: dict[str, QuantizedWeight | DcpTensor] = {}
        if (path / ".metadata").is_file():
            from nemotron4.checkpoint.dcp import dcp_tensors

            self._assembled |= dcp_tensors(path, head_dim=self.config.head_dim)
        else:
            self._files, index_notes = _index(path)
        left: list[str] = []
        hidden: set[str] = set()
        if self.quantization is not None and self.quantization.problem is None:
            expanded, left = quantized_weights(self._files, self.quantization)
            self._assembled |= expanded
            hidden = {part[1].name for weight in expanded.values() for part in weight.parts.values()}
            hidden |= set(left)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, stored.shape, DTYPES[stored.word][0], file, stored.num_bytes)
            for name, (file, stored) in self._files.items()
            if name not in hidden
        } | {
            name: TensorInfo(name, weight.shape, weight.word, weight.file, weight.num_bytes)
            for name, weight in self._assembled.items()
        }
        self._notes = (*config_notes, *index_notes)
        if left:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in left}))
            self._notes += (f"{len(left)} scales of activations and caches ({kinds}) are for vLLM only",)

    def require_readable(self) -> None:
        require_expandable(self.quantization, self.path)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = self._info(name).shape
        return self.read_rows(name, 0, shape[0] if shape else 1, dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows ``start:stop`` of one tensor; nothing else of it is read."""
        self._info(name)
        if name in self._assembled:
            tensor = self._assembled[name].read_rows(start, stop)
        else:
            tensor = read_rows(*self._files[name], start, stop)
        return tensor if dtype is None else tensor.to(dtype)

    def raw_tensor(self, name: str, start: int = 0, stop: int | None = None) -> RawTensor | None:
        if name in self._assembled or self._files[name][1].word not in PLAIN:
            return None
        file, stored = self._files[name]
        part = rows_of(stored, start, stored.shape[0] if stop is None else stop)
        rows_RX = read_bytes(file, name, part.offset, part.num_bytes)
        rows_RX = rows_RX.reshape(part.shape[0], stored.num_bytes // stored.shape[0])
        return RawTensor(part.word, part.shape, rows_RX)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            message, hint = unknown_name("tensor", name, self.tensors)
            raise CheckpointError(f"{self.path}: {message}", hint=hint)
        return self.tensors[name]

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        return _optional_json(self.path / "tokenizer_config.json")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        # ``nemotron4 convert`` names the SentencePiece model that its tokenizer.json was made of: only the
        # model knows which pieces are markers.
        name = self._tokenizer_config.get("sentencepiece_model")
        model = Path(name).name if isinstance(name, str) else None
        return checked_tokenizer(open_tokenizer(self.path, sentencepiece_name=model), self.config, self.path)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @cached_property
    def _template(self) -> str | None:
        return read_chat_template(self.path)

    @property
    def _is_nemotron(self) -> bool:
        return self.config.norm == "layernorm1p"

    @cached_property
    def _prompt_format(self) -> PromptFormat | None:
        return prompt_format(self._template, self.tokenizer, is_nemotron=self._is_nemotron)

    def own_format(self) -> PromptFormat | None:
        return self._prompt_format

    @property
    def notes(self) -> tuple[str, ...]:
        missing = missing_template_note(self.path, self._template, is_nemotron=self._is_nemotron)
        return (*self._notes, *missing)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        generation = _optional_json(self.path / "generation_config.json")
        declared: list[int] = []
        for values in (generation, self._values):
            ids = values.get("eos_token_id")
            declared += ids if isinstance(ids, list) else [] if ids is None else [ids]
        own = self._tokenizer.eos_id
        return end_token_ids(
            declared if declared or own is None else [own],
            self._tokenizer,
            is_nemotron=self._is_nemotron,
            template=self._template,
        )

    @property
    def bos_token_id(self) -> int | None:
        declared = self._values.get("bos_token_id")
        return declared if isinstance(declared, int) else self._tokenizer.bos_id

    @cached_property
    def adds_bos(self) -> bool:
        """The tokenizer's setting; else the post-processor of tokenizer.json; else Llama's own habit."""
        setting = self._tokenizer_config.get("add_bos_token")
        if isinstance(setting, bool):
            return setting
        file = self.path / "tokenizer.json"
        if file.is_file():
            return _starts_with_special(read_json(file).get("post_processor"))
        return not self._is_nemotron


def _starts_with_special(processor: Any) -> bool:
    """True when a tokenizers post-processor puts a special token before a single text."""
    if not isinstance(processor, Mapping):
        return False
    if processor.get("type") == "Sequence":
        return any(_starts_with_special(part) for part in processor.get("processors", []))
    single = processor.get("single") or []
    return processor.get("type") == "TemplateProcessing" and "SpecialToken" in (single[0] if single else {})


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _index(path: Path) -> tuple[dict[str, Place], list[str]]:
    """Where each tensor lies: checked against the shards' own headers, in both directions."""
    if (path / INDEX_FILE).is_file():
        return _sharded(path, path / INDEX_FILE)
    file = path / SINGLE_FILE
    if file.is_file():
        return {name: (file, stored) for name, stored in read_header(file).items()}, []
    pickles = sorted(entry.name for entry in path.glob("*.bin"))
    if pickles:
        raise CheckpointError(
            f"{path}: the weights are Python pickles ({pickles[0]}), which can run code and are never loaded",
            hint="convert them on a machine you trust: save_pretrained(..., safe_serialization=True)",
        )
    raise CheckpointError(f"{path}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def _sharded(path: Path, index_file: Path) -> tuple[dict[str, Place], list[str]]:
    """The index decides: what it does not place in a shard is left out, with a note."""
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_file}: weight_map is missing or not an object of file names")
    found: dict[str, Place] = {}
    notes: list[str] = []
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index_file}: shard {shard!r} is not a plain file name")
        file = path / shard
        expected = {name for name, at in weight_map.items() if at == shard}
        if not file.is_file():
            raise CheckpointError(
                f"{file}: shard is missing; the index expects {len(expected)} tensors in it, "
                f"the first {min(expected)!r}",
                hint="fetch the missing file",
            )
        stored = read_header(file)
        for name in sorted(expected - stored.keys()):
            raise CheckpointError(f"{file}: tensor {name!r} is missing, although {index_file.name} lists it")
        if stale := sorted(stored.keys() - expected):
            more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
            notes.append(f"{file}: {stale[0]!r}{more} left out: {index_file.name} does not place them there")
        found.update({name: (file, stored[name]) for name in stored if name in expected})
    return found, notes
