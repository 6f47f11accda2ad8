"""garak's own environment: its pins conflict with ours, so a virtual one is made in the user's cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from nemotron4.errors import DownloadError
from nemotron4.redteam.garak_areas import ProbeInfo
from nemotron4.runs import held

GARAK_VERSION = "0.17.1"
TORCH_VERSION = "2.13.0"
PYTHON_VARIABLE = "NEMOTRON4_GARAK_PYTHON"
NEEDED_MB = 4000  # 1.8 GB installed, and the downloads beside it

_LIST_PROBES = """
import json
from garak import _plugins
for name, is_active in _plugins.enumerate_plugins("probes"):
    info = _plugins.plugin_info(name)
    print("probe", json.dumps([name.removeprefix("probes."), is_active, info.get("primary_detector"),
                               info.get("goal") or ""]))
"""


def environment_folder() -> Path:
    cache = os.environ.get("NEMOTRON4_CACHE")
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = (
        Path(cache).expanduser() if cache else (Path(base) if base else Path.home() / ".cache") / "nemotron4"
    )
    return root / f"garak-{GARAK_VERSION}"


def garak_python(note: Callable[[str], None]) -> Path:
    """An interpreter that has garak: ``$NEMOTRON4_GARAK_PYTHON``, the one made earlier, or one made now.

    Making it takes some minutes and 1.8 GB. Interrupted, the next call starts it anew.
    """
    if given := os.environ.get(PYTHON_VARIABLE):
        return Path(given)
    folder = environment_folder()
    python = folder / "bin" / "python"
    if not _is_whole(folder):
        with held(folder.with_name(f"{folder.name}.making")):
            if not _is_whole(folder):  # another process may have just made it
                _make(folder, python, note)
    return python


def _is_whole(folder: Path) -> bool:
    return (folder / "installed").exists() and (folder / "bin" / "python").exists()


def _make(folder: Path, python: Path, note: Callable[[str], None]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(folder.parent).free // 10**6
    if free_mb < NEEDED_MB:
        raise DownloadError(
            f"{folder.parent}: {free_mb} MB are free; garak's environment needs {NEEDED_MB} MB",
            hint="set NEMOTRON4_CACHE to a folder with space",
        )
    note(f"making garak's environment in {folder}: 1.8 GB and some minutes, once")
    venv.create(folder, clear=True, with_pip=True)
    log = folder / "install.log"
    # torch first: PyPI's build for Linux brings several GB of CUDA libraries that nothing here uses.
    _install(python, ["-m", "pip", "install", "-q", "uv"], log)
    _install(python, ["-m", "pip", "install", *_torch_index(), f"torch=={TORCH_VERSION}"], log)
    # uv, because pip searches minutes for a set of versions that agree.
    _install(python, ["-m", "uv", "pip", "install", "--python", str(python), f"garak=={GARAK_VERSION}"], log)
    (folder / "installed").write_text(f"garak {GARAK_VERSION}, torch {TORCH_VERSION}\n", encoding="utf-8")


def _torch_index() -> list[str]:
    """PyTorch's index of CPU builds, unless the user's own pip settings say where packages come from."""
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    is_configured = any(word in configured for word in ("index-url", "find-links"))
    if sys.platform != "linux" or is_configured or os.environ.get("PIP_INDEX_URL"):
        return []
    return ["--index-url", "https://download.pytorch.org/whl/cpu"]


def _install(python: Path, arguments: list[str], log: Path) -> None:
    with log.open("ab") as output:
        status = subprocess.run(
            [str(python), *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        ).returncode
    if status:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise DownloadError(
            f"garak {GARAK_VERSION} could not be installed: {' | '.join(tail)}",
            hint=f"all of it is in {log}. Or install garak yourself and set {PYTHON_VARIABLE} to its python",
        )


def known_probes(python: Path, settings: dict[str, str]) -> list[ProbeInfo]:
    """Every probe that this garak has; ``settings`` are environment variables."""
    try:
        ended = subprocess.run(
            [str(python), "-c", _LIST_PROBES],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=settings,
            check=False,
        )
    except OSError as error:
        raise DownloadError(f"{python}: cannot be run: {error.strerror}") from error
    rows = [json.loads(line[6:]) for line in ended.stdout.splitlines() if line.startswith("probe ")]
    if ended.returncode or not rows:
        tail = (ended.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise DownloadError(
            f"{python}: garak does not answer: {tail}",
            hint=f"remove {environment_folder()} and repeat the command, or set {PYTHON_VARIABLE}",
        )
    return [ProbeInfo(*row) for row in rows]
