"""What a run leaves for others: a Hugging Face directory with the trained weights, or an adapter's folder."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nemotron4 import __version__
from nemotron4.checkpoint.convert_files import MANIFEST, read_manifest, write_files
from nemotron4.checkpoint.interface import Checkpoint, Format, TensorInfo
from nemotron4.checkpoint.nemo import NemoCheckpoint
from nemotron4.checkpoint.write_huggingface import huggingface_files
from nemotron4.errors import CheckpointError
from nemotron4.model.config import ModelConfig
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.prompt import PromptFormat
from nemotron4.text.tokenizer import Tokenizer
from nemotron4.training.cache import source_hashes
from nemotron4.training.checkpoints import SavedWeights
from nemotron4.training.inputs import Data
from nemotron4.training.recipe import Recipe, as_plain
from nemotron4.training.trainer import Trainer


class TrainedCheckpoint:
    """The weights of a run's checkpoint with the tokenizer and the format of the model they started from.

    See ``checkpoint.interface.Checkpoint``. ``tokenizer_folder`` holds the tokenizer's files.
    """

    def __init__(
        self, weights: SavedWeights, config: ModelConfig, base: Checkpoint, tokenizer_folder: Path
    ) -> None:
        self._weights = weights
        self._base = base
        self.config = config
        self.path = tokenizer_folder
        self.format: Format = "huggingface"
        self.name = base.name
        self.notes: tuple[str, ...] = ()
        self.bos_token_id, self.adds_bos = base.bos_token_id, base.adds_bos
        self.eos_token_ids = base.eos_token_ids
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, shape, "float32", weights.path, 4 * math.prod(shape))
            for name, shape in weights.shapes.items()
        }

    def require_readable(self) -> None:
        """Always."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.read_rows(name, 0, self.tensors[name].shape[0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        rows = self._weights.read_rows(name, start, stop)
        return rows if dtype is None else rows.to(dtype)

    def raw_tensor(self, name: str) -> None:
        return None

    def tokenizer(self) -> Tokenizer:
        return self._base.tokenizer()

    def prompt_format(self) -> PromptFormat | None:
        return self._base.prompt_format()


def write_model(
    folder: Path,
    weights: SavedWeights,
    config: ModelConfig,
    base: Checkpoint,
    *,
    dtype: torch.dtype,
    fingerprint: str,
) -> None:
    """A directory that ``--model`` and transformers read; a longer run replaces a shorter one's model."""
    settings = {"run": fingerprint}
    if (folder / MANIFEST).is_file() and read_manifest(folder)["settings"] != settings:
        shutil.rmtree(folder)
    tokenizer_folder = folder.parent / "tokenizer"
    write_tokenizer(tokenizer_folder, base)
    checkpoint = TrainedCheckpoint(weights, config, base, tokenizer_folder)
    model_file = tokenizer_folder / "tokenizer.model"
    model = model_file.read_bytes() if model_file.is_file() else None
    files = huggingface_files(checkpoint, dtype=dtype, sentencepiece_model=model)
    write_files(folder, files, settings)


def write_tokenizer(folder: Path, base: Checkpoint) -> None:
    """The tokenizer's files, copied or made from what the checkpoint carries."""
    folder.mkdir(parents=True, exist_ok=True)
    if base.format == "huggingface":
        from nemotron4.checkpoint.write_huggingface import TOKENIZER_FILES

        for name in TOKENIZER_FILES:
            if (base.path / name).is_file():
                (folder / name).write_bytes((base.path / name).read_bytes())
        return
    if isinstance(base, NemoCheckpoint):
        name, data = base.tokenizer_file()
        (folder / ("tokenizer.json" if name.endswith(".json") else "tokenizer.model")).write_bytes(data)
        return
    tokenizer = base.tokenizer()
    if not isinstance(tokenizer, JsonTokenizer):
        raise CheckpointError(
            f"{base.path}: its tokenizer has no Hugging Face form here",
            hint="start from the Hugging Face or NeMo checkpoint instead",
        )
    prompt = base.prompt_format()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
        "eos_token": None if tokenizer.eos_id is None else tokenizer.piece(tokenizer.eos_id),
        "add_bos_token": base.adds_bos,
        "clean_up_tokenization_spaces": False,
    }
    if prompt is not None:
        settings["chat_template"] = prompt.template
    specification = json.dumps(tokenizer.specification, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(specification, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


# ---- What a run was made of: the fingerprint that a continuation must have, and the record for people.

RECORD_FILE = "run.json"


def fingerprint(recipe: Recipe, samples: Data, weights: str) -> str:
    """Changes with anything that changes the loss curve; not with the layout or the length of the run."""
    plain = as_plain(recipe)
    for name in ("run", "parallel", "samples"):
        plain.pop(name, None)
    plain["seed"] = recipe.run.seed
    texts = [json.dumps(plain, sort_keys=True), weights, samples.fingerprint]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


def write_record(recipe: Recipe, read: Data, trainer: Trainer, weights: str) -> None:
    """The resolved recipe, and what it was run with."""
    folder = recipe.run.directory
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "recipe": as_plain(recipe),
        "fingerprint": trainer.fingerprint,
        "start_weights": weights,
        "num_steps": trainer.plan.num_steps,
        "num_samples": len(read.train),
        "num_rows_left_out": len(read.problems),
        "inputs": {
            name: found
            for sources in recipe.data.sources
            for source in sources
            for name, found in source_hashes(source).items()
        },
        "versions": {
            "nemotron4": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": _commit(),
        },
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _commit() -> str | None:
    """The commit of the package's own checkout, if it is one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
