"""One process, one port: closed until the engine can generate, open until the last answer is whole."""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import FrameType

import uvicorn

from nemotron4.engine import CanFail, InferenceEngine, RewardScorer
from nemotron4.errors import ConfigError, Nemotron4Error
from nemotron4.server.app import create_app
from nemotron4.server.guard import Guard
from nemotron4.server.page import PageTab
from nemotron4.server.settings import ServerSettings, Service

BACKLOG = 2048
STALE_CONNECTION_S = 5  # what is still open after the last answer is idle


def run(
    engine_factory: Callable[[], InferenceEngine],
    *,
    port: int,
    settings: ServerSettings | None = None,
    guard: Guard | None = None,
    tabs: Sequence[PageTab] = (),
) -> None:
    """Serve until SIGTERM or SIGINT. Port 0 takes a free one; the readiness line names it.

    The port is bound before the model is loaded, so that a busy port is reported at once, and connections
    are refused until the engine can generate. The first signal lets running requests end and refuses new ones
    with 503; the second one exits at once. Nemotron4Error if the engine ends by itself: a job's other
    processes must not wait for a server that cannot answer.
    """
    settings = settings or ServerSettings()
    page_port = settings.page.port if settings.page else None
    with ExitStack() as stack:
        listeners = [stack.enter_context(bind(settings.host, port))]
        if page_port is not None:
            listeners.append(stack.enter_context(bind(settings.host, page_port)))
        engine = engine_factory()
        stack.callback(engine.close)
        _serve(engine, settings, listeners, guard, tabs)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: connecting to it is refused."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port is {port}; expected 0 (any free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"host {host!r} with port {port} is no address: {error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        # A restart must not wait for the connections of the process before it to be forgotten.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {host}:{port}: {error.strerror}",
        hint="stop the program that holds the port, or choose another one with --port",
    )


def _serve(
    engine: InferenceEngine,
    settings: ServerSettings,
    listeners: Sequence[socket.socket],
    guard: Guard | None,
    tabs: Sequence[PageTab],
) -> None:
    for listener in listeners:
        try:
            listener.listen(BACKLOG)
        except OSError as error:  # another server that was loading took the port in the meantime
            raise _cannot_listen(settings.host, listener.getsockname()[1], error) from error
    _raise_file_limit()
    app = create_app(engine, settings, tabs=tabs, guard=guard)
    config = uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        backlog=BACKLOG,
        access_log=False,
        log_config=None,
        log_level="error",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=STALE_CONNECTION_S,
    )
    line = _ready_line(engine, settings, listeners)
    server = _DrainingServer(config, app.state.service, line)
    server.run(sockets=list(listeners))
    if server.failure is not None:
        raise Nemotron4Error(f"the engine has failed: {server.failure}")


def _ready_line(engine: InferenceEngine, settings: ServerSettings, listeners: Sequence[socket.socket]) -> str:
    urls = [f"http://{_url_host(settings.host)}:{each.getsockname()[1]}" for each in listeners]
    page = "" if settings.page is None else f"page {urls[-1]}/, "
    own = "POST /score" if isinstance(engine, RewardScorer) else "PUT /generate"
    return f"ready: {engine.info.name} on {urls[0]} ({page}{own}, OpenAI under {urls[0]}/v1)"


def _url_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _raise_file_limit() -> None:
    """As many open connections as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < hard:
        wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 65536)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _DrainingServer(uvicorn.Server):
    """uvicorn closes its port at the first signal; this one answers 503 there until the last answer."""

    def __init__(self, config: uvicorn.Config, service: Service, ready_line: str) -> None:
        super().__init__(config)
        self.failure: str | None = None
        self._service = service
        self._ready_line = ready_line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready_line, file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._service.guard is not None:
            await self._service.guard.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.gate.is_draining:
            os._exit(128 + sig)  # the operator does not want to wait, whatever still runs
        self._service.gate.is_draining = True
        num_left = self._service.gate.num_in_flight
        waits = f", waiting for {num_left} requests" if num_left else ""
        os.write(2, f"shutting down{waits}; a second signal exits at once\n".encode())

    async def on_tick(self, counter: int) -> bool:
        if self._service.gate.is_draining and self._service.gate.num_in_flight == 0:
            self.should_exit = True
        if isinstance(self._service.engine, CanFail):
            self.failure = self.failure or self._service.engine.failure
            self.should_exit = self.should_exit or self.failure is not None
        return await super().on_tick(counter)
