"""Any checkpoint into Hugging Face, NeMo or GGUF files: tensor by tensor, resumable, verified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from nemotron4.checkpoint.convert_files import Finished, OutputFile, read_manifest, verify_files, write_files
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.merge_adapter import MergedCheckpoint, adapter_hash
from nemotron4.checkpoint.nemo import NemoCheckpoint
from nemotron4.checkpoint.nemo_files import as_bytes
from nemotron4.checkpoint.write_gguf import GgufScheme, gguf_files
from nemotron4.checkpoint.write_huggingface import huggingface_files
from nemotron4.checkpoint.write_nemo import nemo_files
from nemotron4.checkpoint.write_quantized import Scheme
from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.runs import differences
from nemotron4.text.sentencepiece_tokenizer import SentencePieceTokenizer

Target = Literal["hf", "nemo", "gguf"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


CALIBRATED = ("fp8-static", "int4", "nvfp4")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What is written. ``dtype`` None keeps the source's; ``quantize`` applies to the linear layers."""

    to: Target
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    quantize: Scheme | GgufScheme | None = None
    calibration: Path | None = None  # texts, for the forms below
    adapter: Path | None = None  # of PEFT or NeMo, merged into the weights
    force_adapter: bool = False  # on a base that is not the one it records
    tensor_parallel: int = 1  # NeMo only: chunks per tensor

    def __post_init__(self) -> None:
        known = {"hf": get_args(Scheme), "gguf": get_args(GgufScheme), "nemo": ()}
        if self.quantize is not None and self.quantize not in known[self.to]:
            raise ConfigError(
                f"quantize is {self.quantize!r} and the target {self.to!r}; --to hf takes "
                f"{', '.join(known['hf'])}, --to gguf {', '.join(known['gguf'])}"
            )
        if self.quantize == "fp8-static" and self.calibration is None:
            raise ConfigError(
                "quantize fp8-static needs texts to measure the layers' inputs on",
                hint="--quantize fp8-static --calibration TEXTS.txt",
            )
        if self.calibration is not None and self.quantize not in CALIBRATED:
            raise ConfigError(
                f"quantize is {self.quantize!r}, which does not depend on the layers' inputs; calibration is "
                f"for {', '.join(CALIBRATED)}"
            )
        if self.tensor_parallel != 1 and self.to != "nemo":
            raise ConfigError(f"tensor_parallel is {self.tensor_parallel}; only NeMo files are split")


def convert(
    checkpoint: Checkpoint, destination: Path, options: ConvertOptions, *, is_shown: bool = False
) -> list[Finished]:
    """Write the files of the conversion, or those that an interrupted run left to do."""
    files, settings = plan_conversion(checkpoint, options)
    return write_files(destination, files, settings, is_shown=is_shown)


def verify(checkpoint: Checkpoint, destination: Path, options: ConvertOptions) -> int:
    """Re-read every written file and convert the source once more in memory: hashes must agree.

    Returns the number of bytes compared.
    """
    files, settings = plan_conversion(checkpoint, options)
    manifest = read_manifest(destination)
    if manifest["settings"] != settings:
        raise CheckpointError(
            f"{destination}: holds another conversion: "
            + "; ".join(differences(manifest["settings"], settings))
        )
    total = verify_files(destination)
    expected = {row["name"]: row["sha256"] for row in manifest["files"]}
    for file in files:
        digest = hashlib.sha256()
        for block in file.blocks():
            digest.update(block)
        if digest.hexdigest() != expected.get(file.name):
            raise CheckpointError(
                f"{destination / file.name}: the source gives other bytes than were written",
                hint=f"the source has changed since; delete {destination} and convert again",
            )
    return total


def plan_conversion(
    checkpoint: Checkpoint, options: ConvertOptions
) -> tuple[Sequence[OutputFile], dict[str, Any]]:
    """The files to write, and the settings that identify the conversion."""
    checkpoint.require_readable()
    dtype = DTYPES[options.dtype] if options.dtype else _stored_dtype(checkpoint)
    source = checkpoint
    if options.adapter is not None:
        source = MergedCheckpoint(source, options.adapter, force=options.force_adapter)
    if options.to == "hf":
        files = huggingface_files(
            source,
            dtype=dtype,
            sentencepiece_model=_sentencepiece(checkpoint),
            quantize=cast("Scheme | None", options.quantize),
            calibration=options.calibration,
        )
    elif options.to == "nemo":
        model = _sentencepiece(checkpoint)
        if model is None:
            raise CheckpointError(
                f"{checkpoint.path}: has no SentencePiece tokenizer, which NeMo's Nemotron needs"
            )
        files = nemo_files(
            source, dtype=dtype, tokenizer=("tokenizer.model", model), tensor_parallel=options.tensor_parallel
        )
    else:
        files = gguf_files(
            source,
            dtype=dtype,
            sentencepiece_model=_sentencepiece(checkpoint),
            quantize=cast("GgufScheme | None", options.quantize),
        )
    settings = {
        "source": checkpoint.name,
        "source_tensors": _fingerprint(checkpoint),
        "to": options.to,
        "dtype": str(dtype).removeprefix("torch."),
        "quantize": options.quantize,
        "adapter": None if options.adapter is None else adapter_hash(options.adapter),
        "tensor_parallel": options.tensor_parallel,
    }
    if options.calibration is not None:
        settings["calibration"] = hashlib.sha256(options.calibration.read_bytes()).hexdigest()
    return files, settings


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of the matrices that are not quantised; bfloat16 where they differ, or all are."""
    matrices = [info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2]
    words = {word for word in matrices if word in STORED}
    return STORED[words.pop()] if len(words) == 1 else torch.bfloat16


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Of the names, shapes and types, and of three rows of each: a model that trained on is another one."""
    rows = sorted((info.name, info.shape, info.dtype) for info in checkpoint.tensors.values())
    digest = hashlib.sha256(json.dumps(rows).encode())
    for name, shape, _ in rows:
        for row in sorted({0, shape[0] // 2, shape[0] - 1}):
            digest.update(as_bytes(checkpoint.read_rows(name, row, row + 1, torch.float32).contiguous()))
    return digest.hexdigest()[:16]


def _sentencepiece(checkpoint: Checkpoint) -> bytes | None:
    """The SentencePiece model that the checkpoint carries."""
    if isinstance(checkpoint, NemoCheckpoint):
        name, data = checkpoint.tokenizer_file()
        return None if name.endswith(".json") else data
    if checkpoint.format == "gguf":
        tokenizer = checkpoint.tokenizer()
        return tokenizer.model if isinstance(tokenizer, SentencePieceTokenizer) else None
    path = checkpoint.path / "tokenizer.model"
    return path.read_bytes() if checkpoint.format == "huggingface" and path.is_file() else None
