"""The user's cache of pulled models: where it is, what is in it, what a model's name means.

    <cache>/smollm2/            the embedded model: one GGUF file and its licence
    <cache>/hub/ORG/NAME/       what came from the Hugging Face hub; also NAME@REVISION, NAME:FILE.gguf
    <cache>/partial/...         downloads under way; never looked at by ``resolve``

A model's folder gets its final name only when everything in it is written and checked. A GGUF model is one
file, or the numbered parts that llama.cpp joins (``m-00001-of-00003.gguf``). What other programs have put
into Hugging Face's own cache is read there and never changed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nemotron4.config import cache_dir
from nemotron4.errors import CheckpointError, DownloadError, nearest
from nemotron4.runs import publish

DEMO_NAME = "smollm2"


@dataclass(frozen=True)
class CachedModel:
    name: str
    path: Path
    size_bytes: int  # of the whole folder
    is_ours: bool = True  # not in Hugging Face's own cache


def hub_cache_dir() -> Path:
    """Hugging Face's own cache, where its variables say."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if own := os.environ.get(name):
            return Path(own).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "huggingface" / "hub"


def model_dir(name: str) -> Path:
    """Where a pulled model lies: ``smollm2`` or a hub id. Need not exist."""
    if name == DEMO_NAME:
        return cache_dir() / name
    organisation, _, rest = name.partition("/")
    return cache_dir() / "hub" / organisation / rest.replace("/", "--")


def list_cache() -> list[CachedModel]:
    """Every whole model of both caches, by name."""
    hub = cache_dir() / "hub"
    names = [f"{path.parent.name}/{path.name}" for path in sorted(hub.glob("*/*")) if path.is_dir()]
    if model_dir(DEMO_NAME).is_dir():
        names.append(DEMO_NAME)
    found = [CachedModel(name, resolve(name), _size_bytes(model_dir(name))) for name in names]
    for folder in sorted(hub_cache_dir().glob("models--*--*")):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        path = None if name in names or not is_hub_id(name) else _in_hub_cache(name)
        if path is not None:
            found.append(CachedModel(name, path, _size_bytes(path), is_ours=False))
    return sorted(found, key=lambda model: model.name)


def remove(name: str) -> int:
    """Delete a pulled model; returns the bytes that were freed. CheckpointError if it is not ours."""
    entry = next((model for model in list_cache() if model.name == name), None)
    if entry is None:
        resolve(name)  # says what is near
        raise CheckpointError(f"{name!r} is a path, not a pulled model", hint="delete the folder yourself")
    if not entry.is_ours:
        raise CheckpointError(
            f"{name} is in Hugging Face's cache ({hub_cache_dir()}), which other programs use",
            hint=f"run: hf cache rm model/{name}",
        )
    shutil.rmtree(model_dir(name))
    return entry.size_bytes


def _size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class HubId(NamedTuple):
    """``ORG/NAME``, of a revision (``@REV``), of one GGUF model in it (``:FILE.gguf`` or a part of that)."""

    repository: str
    revision: str | None
    file: str | None

    @property
    def name(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}" + (f":{self.file}" if self.file else "")


def hub_id(model: str) -> HubId | None:
    """None for what is no hub id: two plain parts, then what is after ``@`` and ``:``."""
    pattern = r"([A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w./-]+))?(?::([\w./-]+))?"
    match = re.fullmatch(pattern, model, re.ASCII)
    return None if match is None or ".." in (match[3] or "").split("/") else HubId(*match.groups())


def hub_address_hint(model: str) -> str | None:
    """How to write what is a page of the hub, or Ollama's and llama.cpp's name for one."""
    match = re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)", model)
    return None if match is None else f"write it as {match[1]}"


def is_hub_id(model: str) -> bool:
    return hub_id(model) is not None


def resolve(model: str, *, revision: str | None = None) -> Path:
    """The directory or file that a model's name means: a pulled name, a path, or a pulled hub id.

    ``smollm2`` is always the embedded model; a directory of that name is ``./smollm2``. A path that exists
    wins over a hub id, and our cache over Hugging Face's. Nothing is fetched: a model that is not here is an
    error which says how to get it.
    """
    if model == DEMO_NAME:
        files = sorted(model_dir(DEMO_NAME).glob("*.gguf"))
        if files:
            return files[0]
        raise CheckpointError(
            f"model {DEMO_NAME!r} is not in the cache ({cache_dir()})",
            hint=f"run: nemotron4 pull {DEMO_NAME}",
        )
    path = Path(model).expanduser()
    if revision is None and path.exists():
        return path
    wanted = hub_id(model)
    if wanted is not None:
        wanted = wanted._replace(revision=revision or wanted.revision)
        model = wanted.name
        found = model_dir(model) if model_dir(model).is_dir() else _in_hub_cache(model)
        if found is not None:
            return found
    elif revision is not None:
        raise CheckpointError(
            f"revision is {revision!r}, and {model!r} is not a hub id", hint="a revision is of ORG/NAME"
        )
    known = [DEMO_NAME, *(entry.name for entry in list_cache())]
    if written := hub_address_hint(model):
        hint = written
    elif guess := nearest(model, known):
        hint = f"did you mean {guess!r}?"
    elif wanted is not None:
        hint = f"run: nemotron4 pull {model}"
    else:
        hint = f"give a path, a hub id (ORG/NAME), or one of: {', '.join(sorted(set(known)))}"
    if wanted is not None and "pull" not in hint:
        hint += f" Or fetch it: nemotron4 pull {model}"
    raise CheckpointError(f"no model {model!r}: neither a file, a directory nor a pulled model", hint=hint)


def _in_hub_cache(model: str) -> Path | None:
    """The snapshot of a hub id, or the GGUF file in it, if Hugging Face's cache has it."""
    wanted = hub_id(model)
    assert wanted is not None, model
    folder = hub_cache_dir() / f"models--{wanted.repository.replace('/', '--')}"
    revision = wanted.revision or "main"
    reference = folder / "refs" / revision
    snapshot = folder / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    if not snapshot.is_dir():
        return None
    if wanted.file is not None:
        files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf")]
        named = named_among(files, wanted.file)
        return snapshot / named[0][0] if len(named) == 1 else None
    return snapshot if _has_weights(snapshot) else None


def _has_weights(snapshot: Path) -> bool:
    """Other programs fetch a model's configuration or tokenizer alone, or some of its shards."""
    index = snapshot / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            return True  # what is wrong with it is said when it is opened
        return all((snapshot / str(shard)).exists() for shard in shards)
    if (snapshot / "model_config.yaml").exists():
        return True
    patterns = ("*.safetensors", "*.gguf", "*.bin", ".metadata")
    return any(next(snapshot.glob(pattern), None) for pattern in patterns)


@contextmanager
def locked_partial(name: str) -> Iterator[Path]:
    """A folder for one download under way, held by this process alone. It may hold a killed one's files."""
    folder = cache_dir() / "partial" / name.replace("/", "--").replace(":", "--")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder.parent / f"{folder.name}.lock").open("w")
    except OSError as error:
        raise DownloadError(
            f"the cache folder {cache_dir()} cannot be written: {error.strerror}",
            hint="set NEMOTRON4_CACHE to a folder with free space that you may write",
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system when the process ends, however it ends
        folder.mkdir(exist_ok=True)
        yield folder


def keep(partial: Path, name: str) -> Path:
    """Give a finished download its final name."""
    final = model_dir(name)
    final.parent.mkdir(parents=True, exist_ok=True)
    publish(partial, final)
    return final


_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GgufPart(NamedTuple):
    """What a part's name says: the model, the number of the part (from 1), and how many there are."""

    stem: str
    number: int
    total: int

    @property
    def names(self) -> list[str]:
        """The names of all parts, in order."""
        return [part_name(self.stem, number, self.total) for number in range(1, self.total + 1)]


def part_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05}-of-{count:05}.gguf"


def part_of(name: str) -> GgufPart | None:
    """None if the name is not a part's."""
    match = _PART.fullmatch(name)
    return None if match is None else GgufPart(match[1], int(match[2]), int(match[3]))


def models_among(names: Iterable[str]) -> list[list[str]]:
    """The ``.gguf`` names by model: the parts of one together, in order, whether all are there or not."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in sorted(name for name in names if name.endswith(".gguf")):
        part = part_of(name)
        found.setdefault((name, 0) if part is None else (part.stem, part.total), []).append(name)
    return list(found.values())


def named_among(names: Iterable[str], wanted: str) -> list[list[str]]:
    """The GGUF models that have this name, else those that have it as a part, in any case."""
    models = models_among(names)
    return [files for files in models if wanted in files] or [
        files for files in models if wanted.lower() in files[0].lower()
    ]
