"""One description of a checkpoint, from its headers alone; plan, launch, convert and the engines share it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from nemotron4.checkpoint.huggingface import HuggingFaceCheckpoint
from nemotron4.checkpoint.interface import Checkpoint, Format
from nemotron4.checkpoint.opening import open_checkpoint
from nemotron4.checkpoint.quantized import Quantization
from nemotron4.errors import CheckpointError, Nemotron4Error
from nemotron4.model.config import ModelConfig
from nemotron4.records import Message

# What a stored type is to the planner; other words are computed in 16 bits.
PlannedDtype = Literal["bf16", "fp8", "int8", "int4", "nvfp4"]
PLANNED: dict[str, PlannedDtype] = {
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
    "int8": "int8",
    "int4": "int4",
    "nvfp4": "nvfp4",
}


@dataclass(frozen=True)
class CheckpointDescription:
    """What the headers and small files of a checkpoint say, and what would go wrong with it later."""

    checkpoint: Checkpoint
    quantization: Quantization | None

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def format(self) -> Format:
        return self.checkpoint.format

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @cached_property
    def stored_types(self) -> Mapping[str, int]:
        """The files' word for each type of tensor, and the bytes of all that have it; the largest first."""
        found: dict[str, int] = {}
        for info in self.checkpoint.tensors.values():
            found[info.dtype] = found.get(info.dtype, 0) + info.num_bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def stored_text(self) -> str:
        return ", ".join(f"{word} {size / 1e9:.3f} GB" for word, size in self.stored_types.items())

    @property
    def summary(self) -> str:
        """The same in one sentence, which convert, the engines and the web page show."""
        quantised = "" if self.quantization is None else f", quantised ({self.quantization.method})"
        size = f"{self.config.num_parameters:,} parameters"
        return f"{self.format}, {size} stored as {self.stored_text}{quantised}"

    @property
    def stored_bytes(self) -> int:
        return sum(self.stored_types.values())

    @cached_property
    def served_bytes(self) -> Mapping[str, int]:
        """Bytes of each weight on GPUs: vLLM keeps what is quantised; all else becomes 16 bits."""
        found: dict[str, int] = {}
        for name, info in self.checkpoint.tensors.items():
            weight = name if name.endswith((".weight", ".bias")) else _weight_of(name)
            is_kept = self.quantization is not None and info.dtype not in ("float32", "float64")
            size = info.num_bytes if is_kept else 2 * math.prod(info.shape)
            found[weight] = found.get(weight, 0) + size
        return found

    @property
    def planned_dtype(self) -> PlannedDtype:
        """The type in which the linear layers are computed: a word of ``nemotron4 plan --dtype``."""
        words = [word for word in self.stored_types if word in PLANNED]
        return PLANNED[words[0]] if words and self.quantization is not None else "bf16"

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """What the built-in engine would refuse or get wrong, one sentence each."""
        found = []
        for check in (self.checkpoint.require_readable, self._check_names, self._check_text):
            try:
                check()
            except Nemotron4Error as error:
                found.append(str(error).replace("\nhint: ", "; "))
        return tuple(found)

    def _check_names(self) -> None:
        """Every weight of the model is there once, with its shape."""
        if self.quantization is not None and self.quantization.problem is not None:
            return
        from nemotron4.checkpoint.load import match_weights, meta_module

        match_weights(meta_module(self.config), self.checkpoint, compare_tied=False)

    def _check_text(self) -> None:
        tokenizer = self.checkpoint.tokenizer()
        if (prompt_format := self.checkpoint.prompt_format()) is not None:
            prompt_format.encode(tokenizer, [Message("user", "Hello")])
        beyond = [i for i in self.checkpoint.eos_token_ids if i >= tokenizer.vocab_size]
        if beyond:
            raise CheckpointError(
                f"stop id {beyond[0]} is not in the tokenizer, which has {tokenizer.vocab_size} ids",
                hint="mend eos_token_id in generation_config.json or config.json",
            )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Empty where the tokenizer cannot be opened; ``problems`` says why."""
        try:
            return self.checkpoint.eos_token_ids
        except Nemotron4Error:
            return ()

    @property
    def has_template(self) -> bool:
        try:
            return self.checkpoint.prompt_format() is not None
        except Nemotron4Error:
            return False

    def conversion_bytes(self) -> Mapping[str, int]:
        """About what each form of conversion writes."""
        count = self.config.num_parameters
        linear = sum(
            math.prod(info.shape)
            for name, info in self.checkpoint.tensors.items()
            if name.startswith("model.layers.") and name.endswith("_proj.weight")
        )
        rest = 2 * (count - linear)
        return {"bf16": 2 * count, "fp8": rest + linear, "four bits": rest + linear * 9 // 16}

    def free_bytes(self) -> int:
        path = self.checkpoint.path
        return shutil.disk_usage(path if path.is_dir() else path.parent).free

    def to_json(self) -> dict[str, Any]:
        config = self.config
        return {
            "name": self.name,
            "path": str(self.checkpoint.path),
            "format": self.format,
            "family": "nemotron" if config.norm == "layernorm1p" else "llama",
            "is_reward_model": config.num_reward_attributes > 0,
            "num_parameters": config.num_parameters,
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            "rope_scaling": config.rope_scaling.kind if config.rope_scaling else None,
            "num_tensors": len(self.checkpoint.tensors),
            "stored_types": dict(self.stored_types),
            "stored_bytes": self.stored_bytes,
            "served_bytes": sum(self.served_bytes.values()),
            "planned_dtype": self.planned_dtype,
            "quantization": None if self.quantization is None else self.quantization.method,
            "bits": None if self.quantization is None else self.quantization.bits,
            "has_chat_template": self.has_template,
            "stop_ids": list(self.stop_ids),
            "notes": list(self.checkpoint.notes),
            "problems": list(self.problems),
        }


def _weight_of(name: str) -> str:
    """The weight that a part of a quantised one belongs to: ``W.qweight``, ``W.weight.absmax``."""
    stem = name.partition(".weight")[0] if ".weight" in name else name.rpartition(".")[0]
    return f"{stem}.weight"


def describe_checkpoint(model: str | Path | Checkpoint) -> CheckpointDescription:
    """Open a checkpoint and describe it; no weight is read."""
    checkpoint = open_checkpoint(model)
    quantization = checkpoint.quantization if isinstance(checkpoint, HuggingFaceCheckpoint) else None
    return CheckpointDescription(checkpoint, quantization)
