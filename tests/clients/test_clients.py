"""Real clients against the server: their journeys, and the lines that docs/clients.md shows.

The clients have an environment of their own, made by scripts/clients-env; without it these tests skip.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from nemotron4.server.app import create_app
from nemotron4.server.context import AccessLog
from nemotron4.server.settings import ServerSettings
from tests.clients.scripted import scripted_engine
from tests.server.conftest import serving_app

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
PYTHON = CACHE / "nemotron4" / "clients" / "bin" / "python"
NODE_MODULES = PYTHON.parents[1] / "node" / "node_modules"
MODEL = "nvidia/nemotron-4-340b-instruct"
JOURNEYS = sorted((Path(__file__).parent / "journeys").glob("*.py"))
PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
SHOWN = re.findall(r"^## (.+?)\n.*?^```python\n(.+?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)

pytestmark = [
    pytest.mark.slow,  # each program imports for seconds
    pytest.mark.skipif(not PYTHON.exists(), reason="scripts/clients-env has not made the environment"),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = scripted_engine()
    app = create_app(engine, ServerSettings(served_names=(MODEL,)), access_log=AccessLog(StringIO()))
    with serving_app(app) as url:
        yield url
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)


def run(program: list[str], home: Path, command: str = str(PYTHON)) -> str:
    """What a program of the clients' environment prints; none of them may reach the internet."""
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    ended = subprocess.run(
        [command, *program], capture_output=True, text=True, timeout=110, env={**os.environ, **offline}
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.parametrize("program", JOURNEYS, ids=lambda path: path.stem)
def test_journeys(program: Path, url: str, tmp_path: Path) -> None:
    run([str(program), f"{url}/v1", MODEL], tmp_path)


@pytest.mark.skipif(not NODE_MODULES.exists(), reason="scripts/clients-env found no npm")
def test_journeys_of_the_sdk_of_vercel(url: str, tmp_path: Path) -> None:
    program = JOURNEYS[0].with_name("vercel_client.mjs")
    shutil.copy(program, tmp_path)  # node looks for packages next to a program's own file
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    run([str(tmp_path / program.name), f"{url}/v1", MODEL], tmp_path, "node")


@pytest.mark.parametrize(("name", "code"), SHOWN, ids=[name for name, _ in SHOWN])
def test_what_the_page_shows(name: str, code: str, url: str, tmp_path: Path) -> None:
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 8
    code = code.replace("http://127.0.0.1:1424", url).replace("smollm2", MODEL)
    assert run(["-c", code], tmp_path).strip()
