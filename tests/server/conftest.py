"""A running app over the shipped fake engine: in process for most tests, on a real port for some."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from nemotron4.engine import EngineStats
from nemotron4.inference.fake import FakeEngine
from nemotron4.server.app import create_app
from nemotron4.server.context import AccessLog
from nemotron4.server.guard import Guard
from nemotron4.server.page import PageTab
from nemotron4.server.settings import ServerSettings

JSON = {"Content-Type": "application/json"}


@dataclass
class InProcess:
    """One app without a port. Every call runs a loop of its own."""

    engine: FakeEngine
    settings: ServerSettings = field(default_factory=ServerSettings)
    tabs: Sequence[PageTab] = ()
    guard: Guard | None = None

    def __post_init__(self) -> None:
        self.log = io.StringIO()
        self.app = create_app(
            self.engine, self.settings, access_log=AccessLog(self.log), tabs=self.tabs, guard=self.guard
        )

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://127.0.0.1")

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(send())

    def request_all(self, method: str, path: str, contents: Iterable[str]) -> list[httpx.Response]:
        """One JSON request after the other over one loop."""

        async def send() -> list[httpx.Response]:
            async with self.client() as client:
                return [await client.request(method, path, content=each, headers=JSON) for each in contents]

        return asyncio.run(send())

    def generate(self, body: object, **headers: str) -> httpx.Response:
        return self.request("PUT", "/generate", content=json.dumps(body), headers={**JSON, **headers})

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return self.request("POST", path, content=json.dumps(body), headers={**JSON, **headers})

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


@dataclass
class Running:
    """One app on a loopback port, in a thread."""

    engine: FakeEngine
    port: int
    client: httpx.Client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until(self, is_so: Callable[[EngineStats], object]) -> None:
        """Return once it is so; the test's time limit catches what never is."""
        while not is_so(self.engine.stats()):
            time.sleep(0.002)

    def wait_idle(self) -> None:
        """Return once the engine holds no request."""
        self.wait_until(lambda stats: not stats.num_running and not stats.num_waiting)


@contextlib.contextmanager
def serving_app(app: ASGIApp) -> Iterator[str]:
    """The app on a free port; its address."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", access_log=False, log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def serving(
    engine: FakeEngine, settings: ServerSettings | None = None, tabs: Sequence[PageTab] = ()
) -> Iterator[Running]:
    app = create_app(engine, settings, access_log=AccessLog(io.StringIO()), tabs=tabs)
    with serving_app(app) as url, httpx.Client(base_url=url, timeout=30, verify=False) as client:
        yield Running(engine, int(url.rpartition(":")[2]), client)


@pytest.fixture(scope="session")
def make_app() -> Callable[..., InProcess]:
    """Makes an app from the fake's reply, the server's settings and the fake's own."""

    def make(
        reply: Any = None,
        *,
        settings: ServerSettings | None = None,
        guard: Guard | None = None,
        **engine: Any,
    ) -> InProcess:
        return InProcess(FakeEngine(reply, **engine), settings or ServerSettings(), guard=guard)

    return make


@pytest.fixture(name="serving")
def serving_fixture() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    return serving


@pytest.fixture(name="serving_app")
def serving_app_fixture() -> Callable[[ASGIApp], contextlib.AbstractContextManager[str]]:
    return serving_app
