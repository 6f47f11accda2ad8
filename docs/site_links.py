"""Lets the pages of the site link to files of the repository: a hook of mkdocs (mkdocs.yml names it).

A link to a file above docs/ leads to a copy of that file in the site, which so needs no repository near it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # read as pages of the site
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what the pages link to."""
    wanted = {*PAGES}
    for file in list(files):
        if file.src_uri.endswith(".md"):
            wanted |= {path for _, path in _outside(file.src_uri, file.content_string)}
    for path in sorted(wanted):
        files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links to these copies."""
    here = page.file.src_uri
    if here in PAGES:  # written for the top of the repository
        markdown = LINK.sub(lambda found: f"]({_from_the_top(found[1])}{found[2] or ''})", markdown)
    for target, path in _outside(here, markdown):
        markdown = markdown.replace(f"]({target}", f"]({_relative(_place(path), here)}")
    return markdown


def _from_the_top(target: str) -> str:
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"


def _outside(page: str, markdown: str) -> list[tuple[str, str]]:
    """(link as written, path from the top of the repository) of every link that leaves docs/."""
    found = []
    for target in dict.fromkeys(match[1] for match in LINK.finditer(markdown)):
        path = os.path.normpath(PurePosixPath("docs", page).parent / target)
        if not path.startswith(("docs/", "..")) and (ROOT / path).is_file():
            found.append((target, path))
    return found


def _place(path: str) -> str:
    """Where the copy of a file lies in the site: pages at its top, the README is the start page."""
    if path in PAGES:
        return path
    return "index.md" if path == "README.md" else f"files/{path}"


def _relative(target: str, page: str) -> str:
    return os.path.relpath(target, PurePosixPath(page).parent)
