"""The browser of the tests shows pages, says what went wrong in them, and finds what people cannot use."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import PHONE, Browser

PAGE = b"""<!doctype html><html lang="en"><title>t</title>
<meta http-equiv="Content-Security-Policy" content="script-src 'unsafe-inline'">
<style>@media (prefers-color-scheme: dark) { #go { color: red } }</style>
<main><h1>Page</h1><p id="shown" hidden></p><button id="go">Go</button><input id="unnamed"></main>
<script>document.querySelector("#go").onclick = () => {
  shown.textContent = "gone"; shown.hidden = false; eval("1") }</script></html>"""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_the_browser_acts_looks_and_reports(browser: Browser, url: str, tmp_path: Path) -> None:
    browser.open(url, size=PHONE, dark=True)
    assert browser.run("return [innerWidth, getComputedStyle(go).color]") == [PHONE[0], "rgb(255, 0, 0)"]
    assert browser.problems() == []
    browser.click("#go")
    browser.wait_for("#shown", text="gone")
    assert any("EvalError" in each for each in browser.problems())
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_a_field_without_a_name_is_an_accessibility_problem(browser: Browser, url: str) -> None:
    browser.open(url)
    assert [each.partition(":")[0] for each in browser.accessibility_problems()] == ["label"]
