"""A real headless Chromium for the tests of pages, one for all of them.

Take the fixture ``browser`` (known everywhere, see ``tests/conftest.py``); without Chromium and ChromeDriver
(Debian: ``apt-get install chromium chromium-driver``) the test skips and says so::

    def test_the_page_greets(browser: Browser, serving: ...) -> None:
        with serving(FakeEngine("hello")) as server:
            browser.open(server.url)
            browser.fill("#prompt", "hi")
            browser.click("#send")
            browser.wait_for(".answer", text="hello")
            assert browser.problems() == []
            browser.screenshot(tmp_path / "page.png")

``open`` starts with empty storage; ``driver.refresh()`` keeps it. Names in quotes are CSS selectors; what is
not there after ``PATIENCE_S`` fails the test. All tests with a browser run in the same pytest-xdist worker.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.remote.webelement import WebElement
    from selenium.webdriver.support.ui import Select, WebDriverWait
except ImportError:  # the fixture then skips
    Chrome = Keys = None  # type: ignore[assignment,misc]

__all__ = ["DESKTOP", "PHONE", "Browser", "Keys", "browser"]

PATIENCE_S = 15.0
DESKTOP = (1280, 800)
PHONE = (390, 844)
AXE_VERSION = "4.14.1"
# No sandbox: the tests may run as root, and load no page but their own. The others keep it off the network.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--lang=en-US",
)


class Browser:
    """One window. ``driver`` is Selenium's, for what is not here."""

    def __init__(self, driver: Chrome, downloads: Path) -> None:
        self.driver = driver
        self.downloads = downloads

    def open(self, url: str, *, size: tuple[int, int] = DESKTOP, dark: bool = False) -> None:
        """Load a page in a window of this size, with nothing stored and no problem noted from before."""
        self.driver.get("about:blank")  # so that an address that differs after # alone is loaded too
        origin = "/".join(url.split("/")[:3])
        self.command("Storage.clearDataForOrigin", origin=origin, storageTypes="all")
        self.problems()
        for file in self.downloads.iterdir():  # of an earlier test
            file.unlink()
        width, height = size
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])
        self.driver.get(url)

    def command(self, name: str, **parameters: object) -> Any:
        """One command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def find(self, selector: str) -> WebElement:
        """The first element that matches and is shown."""
        return self.until(lambda: next(iter(self.find_all(selector)), None), f"{selector} is shown")

    def find_all(self, selector: str) -> list[WebElement]:
        """Every element that matches and is shown, at this moment."""
        return [each for each in self.driver.find_elements(By.CSS_SELECTOR, selector) if each.is_displayed()]

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def fill(self, selector: str, text: str) -> None:
        """Type over what a field holds."""
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def choose(self, selector: str, value: str) -> None:
        """The option with this value; a choice that leads to a download forgets earlier ones."""
        for path in self.downloads.iterdir():
            path.unlink()
        Select(self.driver.find_element(By.CSS_SELECTOR, selector)).select_by_value(value)

    def press(self, *keys: str) -> None:
        """Keys to what has the focus; ``Keys`` of Selenium names the special ones."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def wait_for(self, selector: str, *, text: str) -> None:
        """Return once an element that matches shows the text."""
        self.until(
            lambda: any(text in each.text for each in self.find_all(selector)), f"{selector} shows {text!r}"
        )

    def wait_gone(self, selector: str) -> None:
        self.until(lambda: not self.find_all(selector), f"{selector} is gone")

    def until(self, is_so: Callable[[], Any], what: str) -> Any:
        """The first true value, asked for again and again."""
        waiting = WebDriverWait(
            self.driver, PATIENCE_S, 0.02, ignored_exceptions=[StaleElementReferenceException]
        )
        try:
            return waiting.until(lambda _: is_so())
        except TimeoutException:
            raise AssertionError(f"not within {PATIENCE_S:g} s: {what}; console: {self.problems()}") from None

    def run(self, script: str, *arguments: object) -> Any:
        """The value of ``return ...`` in the page; a promise is waited for."""
        return self.driver.execute_script(script, *arguments)

    def problems(self) -> list[str]:
        """What the console said since the last call: exceptions, refused loads, policy violations."""
        entries: list[dict[str, Any]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [str(entry["message"]) for entry in entries if entry["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        image = self.command("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(image["data"]))

    def downloaded(self) -> Path:
        """The newest file that the page saved, once it is whole."""

        def newest() -> Path | None:
            files = [path for path in self.downloads.iterdir() if path.suffix != ".crdownload"]
            return max(files, key=lambda path: path.stat().st_mtime_ns, default=None)

        found = self.until(newest, "a file was saved")
        assert isinstance(found, Path)
        return found

    def accessibility_problems(self) -> list[str]:
        """Serious and critical findings of axe-core, and of every rule about colour contrast."""
        self.run(_axe_source())
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run().then(r => done(r.violations), e => done(String(e)))"
        )
        assert isinstance(found, list), found
        return [
            f"{each['id']}: {each['help']} ({node['html'][:160]})"
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]


def _axe_source() -> str:
    """axe-core from the npm registry, kept between runs; without npm or the registry the test skips."""
    kept = Path(tempfile.gettempdir()) / f"nemotron4-axe-core-{AXE_VERSION}.js"
    if not kept.exists():
        if shutil.which("npm") is None:
            pytest.skip("axe-core: npm is not installed")
        with tempfile.TemporaryDirectory() as folder:
            command = ["npm", "pack", f"axe-core@{AXE_VERSION}", "--silent", "--pack-destination", folder]
            packed = subprocess.run(command, capture_output=True, check=False, timeout=60, cwd=folder)
            archives = list(Path(folder).glob("*.tgz"))
            if packed.returncode or not archives:
                pytest.skip("axe-core: npm could not fetch it")
            with tarfile.open(fileobj=io.BytesIO(archives[0].read_bytes())) as archive:
                source = archive.extractfile("package/axe.min.js")
                assert source is not None
                whole = Path(folder) / "axe.js"
                whole.write_bytes(source.read())
            shutil.move(whole, kept)
    return kept.read_text(encoding="utf-8")


def _program(variable: str, *names: str) -> str | None:
    return os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if Chrome is None:
        pytest.skip("no browser test: the package selenium is not installed")
    chromium = _program("CHROMIUM", "chromium", "chromium-browser", "google-chrome")
    driver_program = _program("CHROMEDRIVER", "chromedriver")
    if chromium is None or driver_program is None:
        pytest.skip("no browser test: chromium and chromedriver (Debian: chromium-driver) are not installed")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    downloads = tmp_path_factory.mktemp("downloads")
    driver = Chrome(options=options, service=Service(driver_program))
    try:
        browser = Browser(driver, downloads)
        browser.command("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        yield browser
    finally:
        driver.quit()
