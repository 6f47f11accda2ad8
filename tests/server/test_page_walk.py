"""A walk through each view with the Tab key, and what a screen reader finds: tests/golden/page_walk.md.

NEMOTRON4_WRITE_PICTURES=1 writes it anew.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nemotron4.inference.fake import FakeEngine
from nemotron4.redteam.session_report import page_tab
from nemotron4.redteam.sessions import SessionStore
from nemotron4.server.page import PageTab
from nemotron4.text.prompt import nemotron4
from tests.browser import Browser, Keys
from tests.server.conftest import serving

WALK = Path(__file__).parents[1] / "golden" / "page_walk.md"
LANDMARKS = (
    "banner",
    "navigation",
    "main",
    "complementary",
    "region",
    "form",
    "heading",
    "status",
    "log",
    "article",
)
MOST_STOPS = 60


def _named(node: dict[str, Any]) -> str:
    """``role "name"`` of one node of the accessibility tree."""
    role, name = node["role"]["value"], node.get("name", {}).get("value", "").strip()
    return f'{role} "{name}"' if name else role


def _tree(browser: Browser) -> list[dict[str, Any]]:
    """The nodes of the accessibility tree, in the order in which they are read."""
    nodes: list[dict[str, Any]] = browser.command("Accessibility.getFullAXTree")["nodes"]
    by_id = {node["nodeId"]: node for node in nodes}
    waiting, found = [nodes[0]], []
    while waiting:
        node = waiting.pop()
        waiting += [by_id[each] for each in reversed(node.get("childIds", [])) if each in by_id]
        if not node["ignored"]:
            found.append(node)
    return found


def _stops(browser: Browser) -> list[str]:
    """Where the Tab key stops, from the top of the page to its end."""
    browser.run("document.activeElement.blur(); window.scrollTo(0, 0)")
    browser.run(
        "const top = document.createElement('span'); top.tabIndex = -1;"
        "document.body.prepend(top); top.focus()"
    )
    stops: list[str] = []
    seen: set[int] = set()
    for _ in range(MOST_STOPS):
        browser.press(Keys.TAB)
        found = browser.command("Runtime.evaluate", expression="document.activeElement")["result"]
        if found.get("className") == "HTMLBodyElement":
            break
        [node] = browser.command(
            "Accessibility.getPartialAXTree", objectId=found["objectId"], fetchRelatives=False
        )["nodes"]
        if node["backendDOMNodeId"] in seen:
            break
        seen.add(node["backendDOMNodeId"])
        assert node.get("name", {}).get("value"), f"a {node['role']['value']} without a name"
        stops.append(_named(node))
    return stops


def _landmarks(browser: Browser) -> list[str]:
    return [_named(node) for node in _tree(browser) if node["role"]["value"] in LANDMARKS]


def _view(title: str, browser: Browser) -> str:
    stops, landmarks = _stops(browser), _landmarks(browser)
    assert len(stops) > 5, title
    return (
        f"### {title}\n\n**Tab stops**: {', '.join(stops)}.\n\n"
        f"**A screen reader finds, in this order**: {', '.join(landmarks)}."
    )


@pytest.mark.slow  # sixty key presses in four views
def test_every_view_can_be_walked_and_the_walk_is_written_down(browser: Browser, tmp_path: Path) -> None:
    engine = FakeEngine("Hello.", name="fake", prompt_format=nemotron4())
    with (
        closing(SessionStore(tmp_path / "sessions.sqlite")) as store,
        serving(engine, tabs=[PageTab(**page_tab(store))]) as running,
    ):
        browser.open(running.url)
        browser.command("Accessibility.enable")
        browser.wait_for("#model.ready", text="fake")
        browser.click("#show-settings")
        browser.fill("#prompt", "Say hello.")
        browser.press(Keys.ENTER)
        browser.wait_for(".answer .note", text="tokens")
        views = [_view("Chat, settings open", browser)]
        browser.click("#views button:nth-child(2)")
        views.append(_view("Raw prompt, settings open", browser))
        browser.click("#views button:nth-child(3)")
        browser.find("#annotator")
        views.append(_view("Red team", browser))
        browser.click("#views button:nth-child(1)")
        browser.click("#compare")
        views.append(_view("Compare", browser))
    walk = "\n\n".join(views) + "\n"
    if os.environ.get("NEMOTRON4_WRITE_PICTURES"):
        WALK.write_text(walk, encoding="utf-8")
    assert WALK.read_text(encoding="utf-8") == walk
