"""What a run leaves for others: a Hugging Face directory with the trained weights, or an adapter's folder."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemotron4 import __version__
from nemotron4.checkpoint.convert_files import MANIFEST, read_manifest, small_file, write_files
from nemotron4.checkpoint.derived import ExtendedCheckpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.nemo import NemoCheckpoint
from nemotron4.checkpoint.trained import RUN_FILES, TrainedCheckpoint
from nemotron4.checkpoint.write_huggingface import config_json, huggingface_files
from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.model.config import ModelConfig
from nemotron4.runs import differences, write_json
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.tokenizer_files import TEMPLATE_FILE
from nemotron4.training.cache import source_hashes
from nemotron4.training.inputs import DATE, RECORD_FILE, Data
from nemotron4.training.recipe import Recipe, as_plain, build
from nemotron4.training.trainer import Trainer


def write_start(recipe: Recipe, base: Checkpoint, config: ModelConfig) -> None:
    """What makes a model of every checkpoint of the run: its tokenizer and configuration, without weights."""
    if recipe.adapter is not None:
        return
    folder = recipe.run.directory / RUN_FILES
    write_tokenizer(folder, base)
    eos = list(base.eos_token_ids)
    ends = {"bos_token_id": base.bos_token_id, "eos_token_id": eos}
    write_json(folder / "generation_config.json", ends)
    values = config_json(config, dtype=torch.float32)
    values |= {"bos_token_id": base.bos_token_id, "eos_token_id": eos[0] if eos else None}
    write_json(folder / "config.json", values)


def write_model(folder: Path, step: Path, *, dtype: torch.dtype, fingerprint: str, card: str) -> None:
    """A directory that ``--model`` and transformers read; a longer run replaces a shorter one's model."""
    settings = {"run": fingerprint}
    if (folder / MANIFEST).is_file() and read_manifest(folder)["settings"] != settings:
        shutil.rmtree(folder)
    checkpoint = TrainedCheckpoint(step)
    model_file = checkpoint.path / "tokenizer.model"
    model = model_file.read_bytes() if model_file.is_file() else None
    files = huggingface_files(checkpoint, dtype=dtype, sentencepiece_model=model)
    write_files(folder, [small_file("README.md", card.encode()), *files], settings)


def result_dtype(recipe: Recipe, base: Checkpoint) -> torch.dtype:
    """The type of the written weights: the start's, where it has one that is not quantised."""
    if recipe.run.result_dtype != "auto":
        return DTYPES[recipe.run.result_dtype]
    words = {info.dtype for info in base.tensors.values() if len(info.shape) == 2}
    same = DTYPES.get(words.pop()) if len(words) == 1 and recipe.model.preset is None else None
    return same or torch.float32


def write_tokenizer(folder: Path, base: Checkpoint) -> None:
    """The tokenizer's files, copied or made from what the checkpoint carries."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(base, ExtendedCheckpoint):
        base.base.chosen_format = base.chosen_format
        write_tokenizer(folder, base.base)
        whole = json.dumps(base.tokenizer().specification, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(whole, encoding="utf-8")
        (folder / "tokenizer.model").unlink(missing_ok=True)  # it would not have the new tokens
        return
    if base.chosen_format is not None:
        (folder / TEMPLATE_FILE).write_text(base.chosen_format.template, encoding="utf-8")
    if base.format == "huggingface":
        from nemotron4.checkpoint.write_huggingface import TOKENIZER_FILES

        for name in TOKENIZER_FILES:
            if (base.path / name).is_file() and not (name == TEMPLATE_FILE and base.chosen_format):
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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# What may change within a run, because the gradient does not depend on it; of what the run starts from and of
# the rows the contents count, not the names.
FREE = (
    "run", "parallel", "samples", "model.device", "model.activation_checkpointing", "batch.row_tokens",
    "policy_gradient.servers", "policy_gradient.server_key_env",
)  # fmt: skip
NAMES = (
    "model.start",
    "model.adapter",
    "model.tokenizer",
    "model.shape",
    "model.prompt_format",
    "data.train",
    "data.validation",
)


def run_facts(recipe: Recipe, read: Data, weights: str, date: str | None = None) -> dict[str, Any]:
    """Everything that decides the loss curve, by name."""
    facts = _settings(recipe)
    for name, group in zip(("train", "validation"), recipe.data.sources, strict=True):
        facts["data"][name] = [
            [as_plain(replace(source, path="")), *source_hashes(source).values()] for source in group
        ]
    if date is not None:
        facts[DATE] = date
    if recipe.data.shares:
        facts["mixture"] = "blocks"  # how positions are drawn; earlier versions drew each by itself
    return facts | {"start": {"weights": weights}, "rendered rows": read.fingerprint}


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Those of a recipe that decide the loss curve, but for what they name."""
    facts: dict[str, Any] = as_plain(recipe)
    for name in (*FREE, *NAMES):
        table, _, key = name.partition(".")
        if key:
            facts.get(table, {}).pop(key, None)
        else:
            facts.pop(table, None)
    if recipe.optimizer.moments == "offloaded":  # the same numbers in another place
        facts["optimizer"]["moments"] = "float32"
    return facts | {"run": {"seed": recipe.run.seed}}


def fingerprint(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def continued_fingerprint(folder: Path, facts: Mapping[str, Any]) -> str:
    """The fingerprint of the run in the folder; ConfigError that names what differs from it."""
    mine = fingerprint(facts)
    record = folder / RECORD_FILE
    if not any((folder / "checkpoints").glob("step-*")) or not record.is_file():
        return mine
    values = json.loads(record.read_text(encoding="utf-8"))
    plain = _plain_facts(facts)
    # A setting that the version that began the run did not have was at its default.
    settings = _plain_facts(_settings(_recorded_recipe(values["recipe"])))
    known = values["facts"] if "facts" in values else _facts_of_files(values, plain)
    joined = {**settings, **known}
    known = {
        name: {**settings.get(name, {}), **entry} if isinstance(entry, dict) else entry
        for name, entry in joined.items()
    }
    found = differences(known, plain)
    # A row's rendering depends on settings that have names of their own.
    found = [text for text in found if not text.startswith("rendered rows")] or found
    if found:
        raise ConfigError(
            f"{folder} is of another run: {'; '.join(found[:6])}",
            hint="give the changed run a new run.directory, or undo the change to continue this one",
        )
    return str(values.get("facts_fingerprint") or values["fingerprint"])


def _recorded_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe of a record, also one of a version that had other names."""
    model = dict(values["model"])
    if "recompute" in model:
        model["activation_checkpointing"] = model.pop("recompute")
    return build({**values, "model": model})


def _facts_of_files(values: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What the records of version 0.1 know of start and rows: hashes of the weights and of each file."""
    files = sorted(values["inputs"].values())
    groups = (now["data"]["train"], now["data"]["validation"])
    is_same = files == sorted(digest for group in groups for _, *digests in group for digest in digests)
    found = {name: now[name] for name in ("rendered rows", DATE) if name in now}
    found["start"] = {"weights": values["start_weights"]}
    return found | {
        "data": dict(zip(("train", "validation"), groups, strict=True)) if is_same else {"train": files}
    }


def _plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def write_record(
    recipe: Recipe,
    read: Data,
    trainer: Trainer,
    weights: str,
    facts: Mapping[str, Any],
    run_fingerprint: str,
) -> None:
    """The resolved recipe, and what it was run with."""
    folder = recipe.run.directory
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "recipe": as_plain(recipe),
        "fingerprint": trainer.fingerprint,
        "facts": facts,
        "facts_fingerprint": run_fingerprint,
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
    write_json(folder / RECORD_FILE, json.loads(json.dumps(record, default=str)), indent=2)


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
