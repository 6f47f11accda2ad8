"""Routes, statuses and bodies of the NeMo server: one case for each row of its observed behaviour."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import httpx
import pytest

from nemotron4.engine import SamplingParams, TokenStep
from nemotron4.inference.fake import FakeEngine
from nemotron4.server.app import create_app
from nemotron4.server.context import AccessLog

App = Callable[..., Any]
GENERATE_ALLOWS = "PUT, GET, HEAD, OPTIONS"
OTHER_ALLOWS = "GET, HEAD, OPTIONS"
BAD_REQUEST = {"message": "The browser (or proxy) sent a request that this server could not understand."}
NOT_JSON_TYPE = {
    "message": "Did not attempt to load JSON data because the request Content-Type was not "
    "'application/json'."
}


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("PUT", "/", 404, None),
        ("POST", "/", 404, None),
        ("DELETE", "/", 404, None),
        ("OPTIONS", "/", 404, None),
        ("PUT", "/other", 405, OTHER_ALLOWS),
        ("POST", "/other", 405, OTHER_ALLOWS),
        ("DELETE", "/other", 405, OTHER_ALLOWS),
        ("PUT", "/generate/", 405, OTHER_ALLOWS),
        ("PUT", "/a/b/c", 405, OTHER_ALLOWS),
        ("GET", "/other", 404, None),
        ("GET", "/generate", 404, None),
        ("HEAD", "/generate", 404, None),
        ("POST", "/generate", 405, GENERATE_ALLOWS),
        ("DELETE", "/generate", 405, GENERATE_ALLOWS),
        ("PATCH", "/generate", 405, GENERATE_ALLOWS),
    ],
)
def test_other_routes_answer_with_flasks_page(
    make_app: App, method: str, path: str, status: int, allow: str | None
) -> None:
    response = make_app().request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers.get("allow") == allow
    if method != "HEAD":
        assert response.text.startswith(f"<!doctype html>\n<html lang=en>\n<title>{status} ")


def test_options_on_generate_is_empty(make_app: App) -> None:
    response = make_app().request("OPTIONS", "/generate")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["allow"] == GENERATE_ALLOWS


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/jsonx", "text/json", "application"]
)
def test_a_body_that_is_not_declared_as_json_is_415(make_app: App, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = make_app().request("PUT", "/generate", content=b'{"sentences":["a"]}', headers=headers)
    assert (response.status_code, response.json()) == (415, NOT_JSON_TYPE)


@pytest.mark.parametrize(
    "content_type",
    ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json", "application/json"],
)
def test_every_json_content_type_is_parsed(make_app: App, content_type: str) -> None:
    app = make_app("b")
    body = b'{"sentences":["a"],"tokens_to_generate":1,"greedy":true}'
    response = app.request("PUT", "/generate", content=body, headers={"Content-Type": content_type})
    assert (response.status_code, response.json()["sentences"]) == (200, ["ab"])


@pytest.mark.parametrize(
    "body", [b"", b"{", b"nope", b"{'sentences': []}", b"\xff\xfe\xff", b'{"a":"\xff"}', b"[" * 100_000]
)
def test_malformed_json_is_400(make_app: App, body: bytes) -> None:
    response = make_app().request(
        "PUT", "/generate", content=body, headers={"Content-Type": "application/json"}
    )
    assert (response.status_code, response.json()) == (400, BAD_REQUEST)
    assert response.text == json.dumps(BAD_REQUEST) + "\n"


@pytest.mark.parametrize("body", [[], [1], "text", 1, None, True])
def test_json_that_is_no_object_is_400_with_a_string(make_app: App, body: object) -> None:
    response = make_app().generate(body)
    assert response.status_code == 400
    assert isinstance(response.json(), str)


def test_nan_and_infinity_are_parsed_and_then_checked(make_app: App) -> None:
    body = b'{"sentences":["a"],"temperature":NaN}'
    response = make_app().request(
        "PUT", "/generate", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 200
    assert response.json() == "temperature must be a positive number less than or equal to 100.0"


def test_an_unknown_key_does_not_matter(make_app: App) -> None:
    body = {"sentences": ["a"], "tokens_to_generate": 1, "greedy": True}
    app = make_app("b")
    assert app.generate({**body, "nonsense": [1]}).json() == app.generate(body).json()


def test_a_defect_of_the_engine_is_500_and_the_next_request_succeeds(make_app: App) -> None:
    app = make_app("b")
    engine: FakeEngine = app.engine
    engine.fail_next(ValueError("a secret prompt"))
    body = {"sentences": ["a"], "tokens_to_generate": 1, "greedy": True}
    failed = app.generate(body)
    assert failed.status_code == 500
    assert isinstance(failed.json(), str)
    assert "secret" not in failed.text + app.log.getvalue()
    assert app.log_lines()[-1]["error"] == "ValueError"
    assert app.generate(body).json()["sentences"] == ["ab"]
    assert engine.stats().num_running == 0


def test_an_engine_that_ends_a_row_without_a_reason_is_a_500_and_no_hang() -> None:
    class Careless(FakeEngine):
        async def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenStep]:
            yield TokenStep(20)

    app = create_app(Careless(), access_log=AccessLog(io.StringIO()))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.put("/generate", json={"sentences": ["a"]})

    assert asyncio.run(ask()).status_code == 500
