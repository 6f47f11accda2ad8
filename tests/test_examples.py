"""Every example runs, on a tiny model or a fake engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from nemotron4.inference.fake import FakeEngine
from nemotron4.text.prompt import nemotron4
from tests.server.conftest import serving
from tests.tiny_models import llama_directory

ROOT = Path(__file__).parents[1]


def _run(name: str, argument: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), argument],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        assert f'_run("{path.name}"' in source


def test_generate_in_the_process(tmp_path: Path) -> None:
    model = llama_directory(tmp_path / "tiny")
    assert _run("generate.py", str(model)).count(" tokens, ended by ") == 2


def test_a_red_team_session_becomes_a_pair(tmp_path: Path) -> None:
    row = json.loads(_run("redteam_sessions.py", str(tmp_path / "attacks.sqlite")))
    assert (row["chosen"], row["rejected"]) == ("I will not help to break in.", "Sure! First, ...")


def test_official_openai_client_streams_from_the_server() -> None:
    with serving(FakeEngine("O NVIDIA, thy chips.", prompt_format=nemotron4())) as running:
        assert _run("openai_client.py", running.url) == "O NVIDIA, thy chips.\n"


def test_arithmetic_data_for_the_grpo_recipe(tmp_path: Path) -> None:
    assert _run("arithmetic_data.py", str(tmp_path / "data")).startswith("300 to imitate, 600 to practise")
    held_out = (tmp_path / "data" / "held_out.jsonl").read_text().splitlines()
    assert not set(held_out) & set((tmp_path / "data" / "practised.jsonl").read_text().splitlines())
