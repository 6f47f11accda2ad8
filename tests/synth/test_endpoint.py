"""Slots of an endpoint: none is lost, however the endpoint pushes back."""

from __future__ import annotations

import asyncio

import pytest

from nemotron4.client import FakeChatModel, TransientError
from nemotron4.errors import ConfigError
from nemotron4.synth.endpoint import ModelEndpoint, StoppedError, connect
from nemotron4.synth.recipe import EndpointConfig, RetryConfig


def endpoint(max_in_flight: int = 2) -> ModelEndpoint:
    config = EndpointConfig(form="fake", max_in_flight=max_in_flight)
    return ModelEndpoint("gen", config, FakeChatModel(), RetryConfig())


def busy(retry_after_s: float) -> TransientError:
    return TransientError("busy", kind="rate_limit", retry_after_s=retry_after_s)


def test_a_pause_that_grows_while_all_wait_ends_nevertheless() -> None:
    async def run() -> None:
        target = endpoint()
        started = await target.acquire()
        target.release()
        target.failed(busy(0.02), started)
        waiting = [asyncio.create_task(target.acquire()) for _ in range(2)]
        await asyncio.sleep(0.005)
        target.failed(busy(0.05), started)
        await asyncio.wait_for(waiting[0], timeout=5)
        target.release()
        await asyncio.wait_for(waiting[1], timeout=5)

    asyncio.run(run())


def test_a_freed_slot_goes_to_one_who_waits() -> None:
    async def run() -> None:
        target = endpoint(max_in_flight=1)
        await target.acquire()
        waiting = asyncio.create_task(target.acquire())
        await asyncio.sleep(0)
        assert not waiting.done()
        target.release()
        await asyncio.wait_for(waiting, timeout=5)
        assert target.limit.in_flight == 1

    asyncio.run(run())


def test_stopping_wakes_everybody_with_the_reason() -> None:
    async def run() -> None:
        target = endpoint(max_in_flight=1)
        await target.acquire()
        waiting = asyncio.create_task(target.acquire())
        await asyncio.sleep(0)
        target.stop(StoppedError())
        with pytest.raises(StoppedError):
            await asyncio.wait_for(waiting, timeout=5)

    asyncio.run(run())


def test_a_missing_key_is_named_before_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    config = EndpointConfig(url="http://127.0.0.1:1/v1", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is empty"):
        connect("gen", config)
    with pytest.raises(ValueError, match="expected an http"):
        EndpointConfig(url="localhost:8000")
