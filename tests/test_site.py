"""The documentation builds as a site: strict, offline, nothing loaded from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site, built once: about six seconds, which is what mkdocs takes for thirty pages."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "--quiet", "build", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, f"a page is missing in mkdocs.yml, or a link leads nowhere:\n{done.stderr}"
    return folder


def test_every_page_is_there_and_files_of_the_repository_come_along(site: Path) -> None:
    pages = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in ROOT.glob("docs/**/*.md")}
    built = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert pages <= built
    assert {"CHANGELOG.html", "CONTRIBUTING.html"} <= built
    assert (site / "files/recipes/nano/recipe.toml").read_bytes() == (
        ROOT / "recipes/nano/recipe.toml"
    ).read_bytes()


def test_nothing_is_loaded_from_another_site(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]*?(?:src|href)="(https?:[^"]+)"', page.read_text("utf-8")
        )
        assert loaded == [], page


def test_lists_and_tables_are_shown_as_such(site: Path) -> None:
    """Markdown readers differ: here a list or a table needs an empty line before it."""
    for page in site.rglob("*.html"):
        article = page.read_text("utf-8").split("<article", 1)[-1].split("</article>")[0]
        text = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", article, flags=re.DOTALL)
        assert not re.search(r"^(?:- |\d+\. |\|[^|\n]+\|)", text, flags=re.MULTILINE), page


def test_the_picture_of_a_terminal_is_made_from_what_a_command_shows() -> None:
    spec = importlib.util.spec_from_file_location("make_terminal", ROOT / "docs" / "make_terminal.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    picture = module.svg("$ nemotron4 chat smollm2\n> 1 < 2?\n" + "yes " * 40)
    shown = [
        element.text for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert shown[:2] == ["$ nemotron4 chat smollm2", "> 1 < 2?"]
    assert len(shown) == 4  # the answer is wrapped
    stored = module.PICTURE.read_text(encoding="utf-8")
    assert not re.search(r"href=|src=|url\(|@import", stored)  # it loads nothing
