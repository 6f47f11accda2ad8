"""The shipped fake behind a real port, in a thread of its own, for commands that run their own event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nemotron4.client import FakeBehaviour
from nemotron4.client.fake_server import FakeServer


@contextmanager
def serving(behaviour: FakeBehaviour | None = None, *, model: str = "fake") -> Iterator[str]:
    """The base URL of a running fake, without ``/v1``."""
    loop = asyncio.new_event_loop()
    server = FakeServer(behaviour, model=model)
    loop.run_until_complete(server.__aenter__())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.root
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
