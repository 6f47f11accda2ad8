"""One garak process: its configuration, its end, and that it never outlives the one who started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron4.client.remote import CARD_END_STRINGS
from nemotron4.records import JsonObject, Message
from nemotron4.text import prompt

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


@dataclass(frozen=True, kw_only=True)
class ScanSettings:
    """How much is asked and how answers are drawn. garak's own defaults, but for ``max_tokens`` (150)."""

    generations: int = 5
    max_prompts: int = 256  # of one probe; some probes take no notice
    max_tokens: int = 256
    temperature: float = 0.7
    concurrency: int = 4
    seed: int = 1
    is_online: bool = False


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
