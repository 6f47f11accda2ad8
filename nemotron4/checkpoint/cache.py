"""The user's cache of pulled models: where it is, what is in it, what a model's name means.

    <cache>/smollm2/            the embedded model: one GGUF file and its licence
    <cache>/hub/ORG/NAME/       what came from the Hugging Face hub
    <cache>/partial/...         downloads under way; never looked at by ``resolve``

A model's folder gets its final name only when everything in it is written and checked. A GGUF model is one
file, or the numbered parts that llama.cpp joins (``m-00001-of-00003.gguf``).
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nemotron4.errors import CheckpointError, DownloadError, nearest

DEMO_NAME = "smollm2"


@dataclass(frozen=True)
class CachedModel:
    name: str
    path: Path
    size_bytes: int  # of the whole folder


def cache_dir() -> Path:
    """``$NEMOTRON4_CACHE``, else ``$XDG_CACHE_HOME/nemotron4``, else ``~/.cache/nemotron4``."""
    if own := os.environ.get("NEMOTRON4_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path counts as unset.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "nemotron4"


def model_dir(name: str) -> Path:
    """Where a pulled model lies: ``smollm2`` or ``ORG/NAME``. Need not exist."""
    return cache_dir() / name if name == DEMO_NAME else cache_dir() / "hub" / name


def list_cache() -> list[CachedModel]:
    """Every whole model of the cache, by name."""
    hub = cache_dir() / "hub"
    names = [f"{path.parent.name}/{path.name}" for path in sorted(hub.glob("*/*")) if path.is_dir()]
    if model_dir(DEMO_NAME).is_dir():
        names.append(DEMO_NAME)
    return [CachedModel(name, resolve(name), _size_bytes(model_dir(name))) for name in sorted(names)]


def _size_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def is_hub_id(model: str) -> bool:
    """``ORG/NAME``: exactly two plain parts."""
    return re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", model, re.ASCII) is not None


def resolve(model: str) -> Path:
    """The directory or file that a model's name means: a pulled name, a path, or a pulled hub id.

    ``smollm2`` is always the embedded model; a directory of that name is ``./smollm2``. A path that exists
    wins over a hub id. Nothing is fetched: a model that is not here is an error which says how to get it.
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
    if path.exists():
        return path
    if is_hub_id(model) and model_dir(model).is_dir():
        return model_dir(model)
    known = [DEMO_NAME, *(entry.name for entry in list_cache())]
    if guess := nearest(model, known):
        hint = f"did you mean {guess!r}?"
    elif is_hub_id(model):
        hint = f"run: nemotron4 pull {model}"
    else:
        hint = f"give a path, a hub id (ORG/NAME), or one of: {', '.join(sorted(set(known)))}"
    if is_hub_id(model) and "pull" not in hint:
        hint += f" Or fetch it: nemotron4 pull {model}"
    raise CheckpointError(f"no model {model!r}: neither a file, a directory nor a pulled model", hint=hint)


@contextmanager
def locked_partial(name: str) -> Iterator[Path]:
    """A folder for one download under way, held by this process alone. It may hold a killed one's files."""
    folder = cache_dir() / "partial" / name.replace("/", "--")
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


def publish(partial: Path, name: str) -> Path:
    """Give a finished download its final name: data on disk first, then one rename."""
    final = model_dir(name)
    final.parent.mkdir(parents=True, exist_ok=True)
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    partial.rename(final)
    _flush(final.parent)
    return final


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
