"""Clients that misbehave on a real port. After each, a good request succeeds and the engine holds nothing."""

from __future__ import annotations

import json
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from nemotron4.inference.fake import FakeEngine
from nemotron4.server.settings import ServerSettings
from nemotron4.text.prompt import nemotron4

ENDLESS = {"prompt": "p", "max_tokens": 40_000, "temperature": 0, "stream": True, "logit_bias": {"40": 100}}


@pytest.fixture
def running(serving: Callable[..., Any]) -> Iterator[Any]:
    """A server that must be idle and well after the test."""
    settings = ServerSettings(send_timeout_s=0.3)
    engine = FakeEngine("fine", prompt_format=nemotron4(), context_length=50_000, max_running=4)
    with serving(engine, settings) as running:
        yield running
        running.wait_idle()
        assert engine.stats().cache_blocks_used == 0
        body = {"sentences": ["p"], "tokens_to_generate": 9, "greedy": True}
        assert running.client.put("/generate", json=body).json()["sentences"] == ["pfine"]


def _connect(running: Any) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=10)


def _reset(connection: socket.socket) -> None:
    """Drop the connection without a farewell."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _request(path: str, body: object, method: str = "POST") -> bytes:
    data = json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def test_2000_connections_opened_and_dropped(running: Any) -> None:
    for number in range(2000):
        connection = _connect(running)
        if number % 4 == 1:
            connection.sendall(b"PUT /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le")
        if number % 4 == 2:
            connection.sendall(_request("/v1/completions", ENDLESS)[:-5])
        if number % 100 == 3:
            connection.sendall(_request("/v1/completions", ENDLESS))
        _reset(connection) if number % 2 else connection.close()


def test_hundreds_of_connections_held_open_and_silent(running: Any) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [_connect(running) for _ in range(min(400, soft // 4))]
    assert running.client.get("/health").status_code == 200
    for connection in held:
        connection.close()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_mid_stream_frees_its_slots(running: Any, path: str) -> None:
    body: dict[str, Any] = {**ENDLESS, "n": 3}
    if path.endswith("chat/completions"):
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": "hi"}]
    for _ in range(5):
        connection = _connect(running)
        connection.sendall(_request(path, body))
        received = b""
        while b"data: " not in received:
            received += connection.recv(4096)
        _reset(connection)
    running.wait_idle()
    assert running.engine.stats().requests_finished_total == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_a_client_that_leaves_while_it_waits_frees_its_slots(running: Any, path: str) -> None:
    body: dict[str, Any] = {**ENDLESS, "stream": False, "n": 8}
    if path == "/generate":
        body = {
            "sentences": ["p"] * 8,
            "tokens_to_generate": 40_000,
            "greedy": True,
            "min_tokens_to_generate": 40_000,
        }
    connection = _connect(running)
    connection.sendall(_request(path, body, "PUT" if path == "/generate" else "POST"))
    running.wait_until(lambda stats: stats.num_waiting)
    connection.close()
    running.wait_idle()
    assert running.engine.stats().requests_finished_total < 8


def test_a_client_that_reads_nothing_is_dropped_and_holds_no_slot(serving: Callable[..., Any]) -> None:
    engine = FakeEngine("fine", context_length=50_000)
    body = {**ENDLESS, "prompt": "p" * 40_000, "echo": True, "n": 100, "max_tokens": 10_000}
    with serving(engine, ServerSettings(send_timeout_s=0.3)) as running:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        connection.sendall(_request("/v1/completions", body))
        running.wait_until(lambda stats: stats.num_running)
        running.wait_idle()
        assert engine.stats().requests_finished_total == 0
        assert running.client.get("/health").status_code == 200
        connection.close()


def test_a_slow_reader_gets_everything_and_holds_no_slot_meanwhile(running: Any) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", running.port))
    connection.settimeout(10)
    connection.sendall(_request("/v1/completions", {**ENDLESS, "max_tokens": 300}))
    received = connection.recv(512)
    running.wait_idle()
    while not received.endswith(b"0\r\n\r\n"):
        received += connection.recv(2048)
    assert received.count(b'"text":') == 300
    assert b"data: [DONE]" in received
    connection.close()


@pytest.mark.parametrize("character", ["a", "<extra_id_1>"])
def test_a_prompt_of_a_megabyte_is_refused_with_the_numbers(running: Any, character: str) -> None:
    text = character * (2**20 // len(character.encode()))
    refused = running.client.put("/generate", json={"sentences": [text]})
    assert refused.status_code == 400
    assert "50000" in refused.json()
    chat = {"messages": [{"role": "user", "content": text}]}
    assert running.client.post("/v1/chat/completions", json=chat).status_code == 400


def test_a_body_over_the_limit_is_413_although_it_is_sent_whole(running: Any) -> None:
    data = b'{"sentences": ["' + b"x" * (9 * 2**20) + b'"]}'
    headers = {"Content-Type": "application/json"}
    assert running.client.put("/generate", content=data, headers=headers).status_code == 413


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 1000,
        b"\xff\xfe\xfd\r\n\r\n",
        b"GET\r\n\r\n",
        b"PUT /generate HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /%ff%fe\xc3( HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /other HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /other HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999999\r\n\r\n{}",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    ],
)
def test_what_is_not_http_is_answered_with_an_error_or_silence(running: Any, garbage: bytes) -> None:
    with _connect(running) as connection:
        connection.settimeout(0.2)
        try:
            connection.sendall(garbage)
            answer = connection.recv(4096)
        except OSError:
            answer = b""
        assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))
        assert not answer.startswith(b"HTTP/1.1 500")


WRONG = (None, True, 0, -1, 1.5, 10**30, "", "\ud800", [None], [[]], {"a": 1}, [1, "a"])
GOOD: dict[str, dict[str, Any]] = {
    "/generate": {"sentences": ["p"], "tokens_to_generate": 1},
    "/v1/completions": {"prompt": "p", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "p"}], "max_tokens": 1},
}


@pytest.mark.parametrize("path", GOOD)
def test_wrong_types_in_every_field_are_never_a_defect(make_app: Callable[..., Any], path: str) -> None:
    app = make_app("fine", prompt_format=nemotron4())
    method = "put" if path == "/generate" else "post"
    page = app.app.openapi()
    body = page["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    if "$ref" in body:
        body = page["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    contents = [
        json.dumps({**GOOD[path], name: value})
        for name in (*body["properties"], "unheard_of")
        for value in WRONG
    ]
    for content, response in zip(contents, app.request_all(method.upper(), path, contents), strict=True):
        assert response.status_code in (200, 400, 404), (content, response.text)
    assert app.engine.stats().num_running == 0


def test_many_clients_at_once_are_all_answered(running: Any) -> None:
    def ask(number: int) -> int:
        bodies: list[dict[str, Any]] = [
            {"sentences": ["p", "pp"], "tokens_to_generate": 5},
            {"sentences": "bad"},
            {"sentences": ["p"], "top_p": 9},
        ]
        return running.client.put("/generate", json=bodies[number % 3]).status_code

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(30))) == [200, 400, 200] * 10
