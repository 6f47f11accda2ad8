"""Which model an adapter belongs to: recorded when it is written, checked when it is put on a model.

``base.json`` lies next to the adapter's files: the base's absolute path, its hub id if it has one, and a hash
of its weights. An adapter of another program has none, and is checked by shapes alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemotron4.checkpoint.cache import is_hub_id, resolve
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.config import cache_dir
from nemotron4.errors import CheckpointError
from nemotron4.model.adapter_files import CONFIG_FILE, read_values
from nemotron4.text.prompt import PromptFormat, find_format
from nemotron4.text.tokenizer import Tokenizer
from nemotron4.text.tokenizer_files import TEMPLATE_FILE, read_chat_template

BASE_FILE = "base.json"
NUM_VALUES = 64  # of each weight's first row


def weights_hash(checkpoint: Checkpoint) -> str:
    """A hash of the layers' weights: names, shapes, and the first values of each in bfloat16.

    So it is the same for the same model in another form or in a wider type, and costs a few reads.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in checkpoint.tensors if ".layers." in name):
        values = checkpoint.read_rows(name, 0, 1).flatten()[:NUM_VALUES].to(torch.bfloat16)
        shape = tuple(checkpoint.tensors[name].shape)
        digest.update(f"{name} {shape}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:32]


def base_name(model: str | Path) -> str:
    """What finds the base from any folder: a hub id, else the absolute path of what the name means."""
    name = str(model)
    if is_hub_id(name) and not Path(name).exists():
        return name
    path = resolve(name)
    hub = cache_dir() / "hub"
    if path.is_relative_to(hub):
        return "/".join(path.relative_to(hub).parts[:2])
    return str(path.absolute())


def write_base(folder: Path, base: Checkpoint, name: str, more: Mapping[str, Any]) -> None:
    """Record the base; ``more`` is kept with it (how an adapter was composed)."""
    values = {"path": str(base.path.absolute()), "base": name, "weights_hash": weights_hash(base), **more}
    (folder / BASE_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_base(folder: Path) -> dict[str, Any]:
    """What ``write_base`` left; empty for an adapter of another program."""
    path = folder / BASE_FILE
    if not path.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return values


def adapter_format(folder: Path, tokenizer: Tokenizer) -> PromptFormat | None:
    """The prompt format that an adapter was trained in; None where its folder has no template."""
    template = read_chat_template(folder) if folder.is_dir() else None
    return None if template is None else find_format(tokenizer, template)


def write_format(folder: Path, base: Checkpoint) -> None:
    """Keep a prompt format that is not the base's own with the adapter that was trained in it."""
    found, own = base.prompt_format(), getattr(base, "base", base).own_format()
    if found is not None and found != own:
        (folder / TEMPLATE_FILE).write_text(found.template, encoding="utf-8")


def check_base(folder: Path, base: Checkpoint, *, force: bool = False) -> None:
    """CheckpointError if the adapter records another base than the one it is put on."""
    recorded = read_base(folder) if folder.is_dir() else {}
    if force or not recorded or recorded["weights_hash"] == weights_hash(base):
        return
    raise CheckpointError(
        f"{folder}: the adapter was trained on {recorded['base']}, and this is {base.path}, "
        "whose weights are others",
        hint="open it on its own base, or use --force-adapter where you mean it",
    )


def base_of(folder: Path) -> str:
    """The model that an adapter alone is opened on; CheckpointError if it cannot be told or found."""
    recorded = read_base(folder)
    named = str(
        recorded.get("base") or read_values(folder / CONFIG_FILE).get("base_model_name_or_path") or ""
    )
    for candidate in (named, str(recorded.get("path", ""))):
        try:
            if candidate:
                resolve(candidate)
                return candidate
        except CheckpointError:
            continue
    raise CheckpointError(
        f"{folder}: its base {named or 'is not recorded, and'} cannot be found here",
        hint=f"pull it, or name it: --model BASE --adapter {folder}",
    )
