"""Other tools and this one on the same fake endpoint: size, start, speed, kill -9, hopeless prompts.

    python benchmarks/synth/peers.py --environment distilabel=/tmp/env-distilabel \\
        --environment datadesigner=/tmp/env-datadesigner --environment curator=/tmp/env-curator

Each tool runs in an environment of its own (distilabel[openai] 1.5.3 with requests, data-designer 0.9.6,
bespokelabs-curator 0.1.31); ours in the one that runs this script. Every tool sends the same prompts, one
call each, with the same number in flight, to a fake server in a process of its own. The child scripts
stand in ``peer_runs``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HOPELESS = "a prompt that the endpoint refuses"


@contextlib.contextmanager
def fake_server(latency_ms: float) -> Iterator[str]:
    command = [sys.executable, "-m", "nemotron4.client.fake_server", "--latency-ms", str(latency_ms),
               "--hopeless", HOPELESS, "--count-bodies"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def num_calls(url: str) -> int:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats", timeout=60) as answer:
        stats = json.load(answer)
    return int(sum(stats["calls"].values()))


class Tool:
    """One tool's child script, in its environment."""

    def __init__(self, name: str, environment: Path | None) -> None:
        self.name = name
        self.environment = environment
        self.python = sys.executable if environment is None else str(environment / "bin" / "python")

    def start(self, url: str, folder: Path, in_flight: int) -> subprocess.Popen[bytes]:
        script = str(HERE / "peer_runs" / f"run_{self.name}.py")
        command = [self.python, script, url, str(folder / "prompts.jsonl"), str(folder / "out.jsonl"),
                   str(folder / "state"), str(in_flight)]  # fmt: skip
        (folder / "state").mkdir(exist_ok=True)
        log = (folder / "log.txt").open("ab")
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)

    def size_mb(self) -> int | None:
        if self.environment is None:
            return None
        files = (path for path in self.environment.rglob("*") if path.is_file() and not path.is_symlink())
        return round(sum(path.stat().st_size for path in files) / 1e6)


def end(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of the tool with every process it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(process: subprocess.Popen[bytes], url: str, *, calls: int, patience_s: float) -> str:
    """``ended``, ``calls`` when so many were answered, or ``hangs`` after so long without any new call."""
    seen, changed_at = num_calls(url), time.monotonic()
    while process.poll() is None:
        now = num_calls(url)
        if now >= calls:
            return "calls"
        if now != seen:
            seen, changed_at = now, time.monotonic()
        elif time.monotonic() - changed_at > patience_s:
            return "hangs"
        time.sleep(0.02)
    return "ended"


def write_prompts(folder: Path, number: int, hopeless: int = 0) -> None:
    every = number // hopeless if hopeless else number + 1
    texts = [
        f"Tell me about subject {i}." + (f" ({HOPELESS})" if (i + 1) % every == 0 else "")
        for i in range(number)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def rows_out(folder: Path) -> tuple[int, int]:
    """Usable rows, and how many of them are distinct."""
    path = folder / "out.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    good = [row["prompt"] for row in map(json.loads, lines) if row["text"]]
    return len(good), len(Counter(good))


def speed(tool: Tool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the start of the process to its first call, and calls per second from there to its end."""
    with fake_server(arguments.latency_ms) as url, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder, arguments.prompts)
        started = time.monotonic()
        process = tool.start(url, folder, arguments.in_flight)
        try:
            outcome = wait(process, url, calls=1, patience_s=arguments.patience_s)
            first = time.monotonic()
            if outcome == "calls":
                outcome = wait(process, url, calls=10**9, patience_s=arguments.patience_s)
            seconds = time.monotonic() - first
            rows, _ = rows_out(folder)
            rate = arguments.prompts / seconds
            return {"outcome": outcome, "start_s": round(first - started, 1), "rows": rows,
                    "calls_per_s": round(rate, 1), "calls": num_calls(url)}  # fmt: skip
        finally:
            end(process)
            keep_log(tool, "speed", folder, arguments)


def killed(tool: Tool, arguments: argparse.Namespace) -> dict[str, Any]:
    """kill -9 when half of the replies have been sent, then the same command again."""
    with fake_server(arguments.kill_latency_ms) as url, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder, arguments.kill_prompts)
        process = tool.start(url, folder, arguments.in_flight)
        try:
            wait(process, url, calls=arguments.kill_prompts // 2, patience_s=arguments.patience_s)
            end(process)
            time.sleep(1)
            process = tool.start(url, folder, arguments.in_flight)
            outcome = wait(process, url, calls=10**9, patience_s=arguments.patience_s)
            rows, distinct = rows_out(folder)
            return {"outcome": outcome, "rows_lost": arguments.kill_prompts - distinct, "rows": rows,
                    "calls": num_calls(url), "paid_twice": num_calls(url) - arguments.kill_prompts
                    if outcome == "ended" else None}  # fmt: skip
        finally:
            end(process)
            keep_log(tool, "killed", folder, arguments)


def refused(tool: Tool, arguments: argparse.Namespace) -> dict[str, Any]:
    """2 % of the prompts are answered 400, always."""
    hopeless = arguments.kill_prompts // 50
    with fake_server(0) as url, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder, arguments.kill_prompts, hopeless)
        process = tool.start(url, folder, arguments.in_flight)
        try:
            outcome = wait(process, url, calls=10**9, patience_s=arguments.patience_s)
            rows, _ = rows_out(folder)
            return {"outcome": outcome, "good_rows_lost": arguments.kill_prompts - hopeless - rows,
                    "extra_calls": num_calls(url) - arguments.kill_prompts}  # fmt: skip
        finally:
            end(process)
            keep_log(tool, "refused", folder, arguments)


def keep_log(tool: Tool, part: str, folder: Path, arguments: argparse.Namespace) -> None:
    if arguments.logs is not None:
        arguments.logs.mkdir(parents=True, exist_ok=True)
        (arguments.logs / f"{tool.name}-{part}.txt").write_bytes((folder / "log.txt").read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--environment", action="append", default=[], metavar="TOOL=FOLDER")
    parser.add_argument("--part", action="append", choices=("speed", "killed", "refused"))
    parser.add_argument("--prompts", type=int, default=1000, help="of the speed part")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="of the speed part")
    parser.add_argument("--kill-prompts", type=int, default=300)
    parser.add_argument("--kill-latency-ms", type=float, default=1000.0)
    parser.add_argument("--in-flight", type=int, default=50)
    parser.add_argument("--patience-s", type=float, default=90.0, help="without a call for so long, it hangs")
    parser.add_argument("--logs", type=Path, help="keep what the tools print")
    arguments = parser.parse_args()
    tools = [Tool("ours", None)]
    for entry in arguments.environment:
        name, _, folder = entry.partition("=")
        tools.append(Tool(name, Path(folder)))
    parts = {"speed": speed, "killed": killed, "refused": refused}
    for name in arguments.part or list(parts):
        for tool in tools:
            result = parts[name](tool, arguments)
            print(
                json.dumps({"part": name, "tool": tool.name, "size_mb": tool.size_mb(), **result}), flush=True
            )


if __name__ == "__main__":
    main()
