"""Every command of the tutorials runs, in the order of the page, on a tiny model in the place of smollm2.

```sh`` blocks are run line by line (``nemotron4`` in this process, so that torch is loaded once), ```python``
blocks in a process of their own; other blocks are output or need a network. Port 1424 is a free one here.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemotron4.checkpoint import shipped
from nemotron4.checkpoint.hub import SMOLLM2
from nemotron4.cli.child_server import ChildServer
from nemotron4.cli.main import main
from tests.fake_serving import serving
from tests.tiny_models import nemotron_directory

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
ADDRESS = "http://127.0.0.1:1424"
SERVE = "nemotron4 serve smollm2"


def _blocks(name: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block of a tutorial."""
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def _commands(block: str) -> list[str]:
    """One entry a command: continued lines, open quotes and here-documents belong together."""
    if "<<" in block:
        return [block]
    commands: list[str] = []
    pending = ""
    for line in block.splitlines():
        pending += line + "\n"
        if line.endswith("\\") or pending.count("'") % 2:
            continue
        commands.append(pending)
        pending = ""
    return commands


class Reader:
    """Somebody who types what the page says, in a folder that has the recipes."""

    def __init__(self, address: str) -> None:
        self.address = address

    def follow(self, name: str) -> None:
        for language, text in _blocks(name):
            if language == "sh":
                for command in _commands(text):
                    self.type(command)
            elif language == "python":
                self._run([sys.executable, "-c", text.replace(ADDRESS, self.address)])

    def type(self, command: str) -> None:
        command = command.replace(ADDRESS, self.address)
        if command.strip() == SERVE:
            return  # it runs since the start of the page
        if command.startswith("nemotron4 "):
            words = shlex.split(command.replace("\\\n", " "))
            assert main(words[1:]) == 0, command
        else:
            self._run(["bash", "-euc", command])

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command[-1]}\n{done.stderr}"
        assert '"error":{' not in done.stdout, f"{command[-1]}\n{done.stdout}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of models where smollm2 is tiny."""
    folder = tmp_path_factory.mktemp("models")
    # Blocks of GGUF need multiples of 32, llama.cpp that heads times their size are the width.
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    tiny = nemotron_directory(folder / "tiny", max_position_embeddings=2048, **shape)
    smollm2 = folder / "cache" / "smollm2"
    assert main(["convert", str(tiny), str(smollm2), "--to", "gguf"]) == 0
    pulled = smollm2 / Path(SMOLLM2.member).name  # so that `pull` finds it there
    next(smollm2.glob("*.gguf")).rename(pulled)
    # The adapter that ships is of the real model's shape; a model that it was merged into is taken as it is.
    found = shipped.merged_file()
    merged = smollm2 / found.parent.name / found.name
    merged.parent.mkdir()
    shutil.copy(pulled, merged)
    return folder / "cache"


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the recipes, which is where the page is followed."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEMOTRON4_CACHE", str(models))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # whoever has nothing to say to `chat`
    return tmp_path


@contextmanager
def _tiny_server(folder: Path) -> Iterator[str]:
    port = _free_port()
    command = [sys.executable, "-m", "nemotron4.cli.lifeline", *SERVE.split()[1:], "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with ChildServer(command, url=url, log=folder / "server.log") as server:
        server.wait_until_ready(timeout_s=60)
        yield url


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_every_tutorial_is_followed_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for page in TUTORIALS.glob("*.md"):
        assert f'.follow("{page.stem}")' in source, page.name


def test_serve_a_model_and_call_it(here: Path) -> None:
    with _tiny_server(here) as url:
        Reader(url).follow("serve")
    assert (here / "answers.jsonl").read_text().count("\n") == 1


def test_make_a_preference_set(here: Path) -> None:
    with serving(model="smollm2") as url:
        Reader(url).follow("preferences")
    assert (here / "runs/fake/export/preference.jsonl").read_text().count("\n") == 25


def test_align_a_model_and_compare(here: Path) -> None:
    reader = Reader(ADDRESS)
    reader.type(_blocks("evaluate")[0][1])  # the folder that the page takes over
    reader.follow("align")
    assert (here / "runs/orders/adapter").is_dir()


def test_evaluate_a_model(here: Path) -> None:
    Reader(ADDRESS).follow("evaluate")
    assert (here / "report/report.html").is_file()


def test_convert_and_plan(here: Path) -> None:
    Reader(ADDRESS).follow("convert")
    assert (here / "answers.jsonl").read_text().count("\n") == 1
