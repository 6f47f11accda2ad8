"""garak: an environment of its own, and one process of it that never outlives the one who started it.

Its pins conflict with ours, so a virtual environment is made in the user's cache.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron4.client.remote import CARD_END_STRINGS
from nemotron4.config import cache_dir
from nemotron4.errors import DownloadError
from nemotron4.records import JsonObject, Message
from nemotron4.redteam.garak_areas import ProbeInfo
from nemotron4.redteam.settings import ScanSettings
from nemotron4.runs import held
from nemotron4.text import prompt

GARAK_VERSION = "0.17.1"
TORCH_VERSION = "2.13.0"
PYTHON_VARIABLE = "NEMOTRON4_GARAK_PYTHON"
NEEDED_MB = 4000  # 1.8 GB installed, and the downloads

_LIST_PROBES = """
import json
from garak import _plugins
for name, is_active in _plugins.enumerate_plugins("probes"):
    info = _plugins.plugin_info(name)
    print("probe", json.dumps([name.removeprefix("probes."), is_active, info.get("primary_detector"),
                               info.get("goal") or ""]))
"""


def environment_folder() -> Path:
    return cache_dir() / f"garak-{GARAK_VERSION}"


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


# --- one process

STALL_S = 1800.0  # a process that writes nothing for so long is ended
POLL_S = 0.2
NOTE_S = 15.0

# The writing end of standard input is ours: when we are gone, however it happened, garak and its workers end.
_RUNNER = """
import os, runpy, signal, sys, threading
def watch():
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
sys.argv = ["garak", *sys.argv[1:]]
runpy.run_module("garak", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is attacked. ``url`` ends in ``/generate`` (the card's server) or ``/v1`` (OpenAI-compatible)."""

    url: str
    model: str
    api_key: str | None = None

    @property
    def is_generate(self) -> bool:
        return self.url.endswith("/generate")


def configuration(target: Target, settings: ScanSettings, reports: Path, prefix: str) -> JsonObject:
    """garak's configuration of one process. The key is not in it: it comes from the environment."""
    kind, generators = _generator(target, settings)
    return {
        "run": {
            "generations": settings.generations,
            "seed": settings.seed,
            "soft_probe_prompt_cap": settings.max_prompts,
        },
        "system": {"parallel_attempts": settings.concurrency if settings.concurrency > 1 else False},
        "plugins": {"target_type": kind, "target_name": target.model, "generators": generators},
        "reporting": {"report_dir": str(reports.absolute()), "report_prefix": prefix},
    }


def _generator(target: Target, settings: ScanSettings) -> tuple[str, JsonObject]:
    if not target.is_generate:
        own: dict[str, Any] = {
            "uri": f"{target.url}/",
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "stop": None,  # garak's default ends an answer at the first '#' or ';'
        }
        return "openai.OpenAICompatible", {"openai": {"OpenAICompatible": own}}
    headers = {"Content-Type": "application/json"}
    if target.api_key:
        headers["Authorization"] = "Bearer $KEY"
    written = prompt.render([Message("user", "$INPUT")])
    before, _, after = written.partition("$INPUT")
    body = {
        "sentences": [written],
        "tokens_to_generate": settings.max_tokens,
        "temperature": settings.temperature or 1.0,
        "greedy": settings.temperature == 0,
        "add_BOS": False,
        "top_k": 0,
        "top_p": 1.0,
        "all_probs": False,
        "repetition_penalty": 1.0,
        "min_tokens_to_generate": 1,
        "end_strings": list(CARD_END_STRINGS),
    }
    own = {
        "name": target.model,
        "uri": target.url,
        "method": "put",
        "headers": headers,
        "req_template_json_object": body,
        "response_json": True,
        "response_json_field": "$.sentences[0]",
        # The reply repeats the prompt with its template, in which a detector would find the attack itself.
        "skip_seq_start": before,
        "skip_seq_end": after,
        "request_timeout": 600,
    }
    return "rest.RestGenerator", {"rest": {"RestGenerator": own}}


def garak_environment(out: Path, settings: ScanSettings, api_key: str | None = None) -> dict[str, str]:
    """garak's variables: its files stay below ``out``; offline it asks no hub and sees no other key."""
    values = dict(os.environ)
    if not settings.is_online:
        values = {name: value for name, value in values.items() if not name.endswith("_API_KEY")}
        values |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    for name in ("DATA", "CACHE", "CONFIG"):
        values[f"XDG_{name}_HOME"] = str((out / "garak").absolute() / name.lower())
    key = api_key or "none"
    return values | {"OPENAICOMPATIBLE_API_KEY": key, "REST_API_KEY": key, "PYTHONUNBUFFERED": "1"}


def run_garak(
    python: Path,
    config: JsonObject,
    probes: tuple[str, ...],
    *,
    folder: Path,
    name: str,
    environment: Mapping[str, str],
    note: Callable[[str], None],
    stall_s: float = STALL_S,
) -> str | None:
    """Run to the end; None, or the reason why it did not end well. The report tells what was finished."""
    config_path, log = folder / f"{name}.config.json", folder / f"{name}.log"
    config_path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    spec = ",".join(f"probes.{probe}" for probe in probes)
    command = [str(python), "-c", _RUNNER, "--config", str(config_path.absolute()), "--spec", spec]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--narrow_output"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=dict(environment),
            start_new_session=True,
        )
        try:
            reason = _wait(process, log, folder / f"{name}.report.jsonl", note, stall_s)
        finally:
            _end(process)
    if reason is None and process.returncode:
        words = _last_words(log)
        reason = f"garak ended with status {process.returncode}: {words}"
    return reason


def _wait(
    process: subprocess.Popen[bytes], log: Path, report: Path, note: Callable[[str], None], stall_s: float
) -> str | None:
    started = changed = noted = time.monotonic()
    size = -1
    while process.poll() is None:
        time.sleep(POLL_S)
        now, size_now = time.monotonic(), _size(log) + _size(report)
        if size_now != size:
            size, changed = size_now, now
        elif now - changed > stall_s:
            return f"garak made no progress for {stall_s:.0f} s and was ended"
        if now - noted >= NOTE_S:
            noted = now
            note(f"  {_num_answers(report)} prompts answered, {now - started:.0f} s")
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _num_answers(report: Path) -> int:
    """Attempts are written when they are answered and again when they are judged."""
    if not report.exists():
        return 0
    start = b'{"entry_type": "attempt"'
    with report.open("rb") as lines:
        return sum(line.startswith(start) and b'"status": 1' in line[:300] for line in lines)


def _end(process: subprocess.Popen[bytes]) -> None:
    """All of its process group, workers included."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _last_words(log: Path) -> str:
    """The last line that says something: an exception, or garak's own complaint."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it wrote nothing"
