"""The record and the page of ``benchmarks/inference/run``."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "inference"


def loaded(name: str, file: str) -> ModuleType:
    loader = SourceFileLoader(name, str(FOLDER / file))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run() -> ModuleType:
    return loaded("inference_run", "run")


def entry(cell: str, median: float | None, *, unit: str = "tokens/s", processor: str = "a") -> dict[str, Any]:
    return {
        "model": "nano", "cell": cell, "peer": "ours", "precision": "int8", "processor": processor,
        "unit": unit, "median": median, "date": "2026-11-30", "version": "nemotron4 1", "load": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "unit", "before", "after", "is_slower"),
    [
        ("one", "tokens/s", 100.0, 89.0, True),
        ("one", "tokens/s", 100.0, 92.0, False),
        ("one", "tokens/s", 100.0, 150.0, False),
        ("start", "s", 1.0, 1.2, True),
        ("start", "s", 1.0, 0.5, False),
        ("one", "tokens/s", 100.0, None, False),
    ],
)
def test_what_got_slower_than_a_tenth_is_named(
    run: ModuleType, tmp_path: Path, cell: str, unit: str, before: float, after: float | None, is_slower: bool
) -> None:
    old = [
        entry(cell, before, unit=unit),
        entry(cell, 1e9 if unit != "s" else 1e-9, unit=unit, processor="b"),
    ]
    (tmp_path / "record.json").write_text(json.dumps(old))
    record = run.Record(tmp_path / "record.json")
    for median in (
        1.0,
        after,
    ):  # what is known of a figure after its second round takes the place of the first
        record.put(entry(cell, median, unit=unit))
    assert bool(record.slower()) == is_slower
    assert len(json.loads((tmp_path / "record.json").read_text())) == 3


def test_the_page_has_a_table_and_says_that_the_machine_was_busy(tmp_path: Path) -> None:
    entries = [entry("one", 123.4), {**entry("one", 60.0), "peer": "llamacpp", "load": 9.0}]
    loaded("inference_report", "report.py").write(entries, tmp_path / "page.md", command="run")
    page = (tmp_path / "page.md").read_text()
    assert "| one stream, tokens/s | 123.4 | 60 |" in page
    assert "Other programs ran at the same time" in page
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_peers_of_a_heavy_environment_run_when_named(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(_: Any, options: Any) -> None:
        asked.append((options.peers, [run.precisions("vllm", m, options.precisions) for m in options.models]))

    monkeypatch.setattr(run, "measure", measured)
    for more in ([], ["--peers", "ours", "vllm", "--models", "small", "demo"]):
        arguments = ["run", "--folder", str(tmp_path), "--record", str(tmp_path / "record.json"), *more]
        monkeypatch.setattr(sys, "argv", arguments)
        assert run.main() == 0
    assert asked[0][0] == ["ours", "transformers", "llamacpp"]
    assert asked[1] == (["ours", "vllm"], [("float32", "bfloat16"), ()])  # the demo model is a GGUF file
    assert all((FOLDER / f"peer_{peer}.py").exists() and peer in run.PRECISIONS for peer in run.PEERS)


def test_an_environment_loses_what_does_not_load_beside_its_torch(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(run.venv, "create", lambda home, **_: Path(home).mkdir(parents=True))
    monkeypatch.setattr(run.subprocess, "run", lambda command, **_: commands.append(command[3:]))
    for peer in ("llamacpp", "vllm", "vllm"):
        assert run.environment(tmp_path, peer).parts[-3:] == (peer, "bin", "python")
    assert [command[0] for command in commands] == ["install", "install", "uninstall"]
    assert "torch==2.13.0+cpu" in commands[1]
    assert "torchaudio" in commands[2]


def test_a_peer_ends_with_its_processes_and_counts_their_memory() -> None:
    code = """
import multiprocessing, os, time, cells

def hold(pipe):
    held = b"x" * 200_000_000
    pipe.send(len(held))
    time.sleep(3600)

if __name__ == "__main__":
    here, there = multiprocessing.Pipe()
    alone = cells.peak_bytes(os.getpid())
    multiprocessing.get_context("fork").Process(target=hold, args=(there,)).start()
    here.recv()
    cells.answer("peer 1", alone / 1e6)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(ended.stdout)
    assert found["memory_mb"] > found["value"] + 200
