"""The page's files, headers and own routes, and what they pass on to other servers."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from nemotron4.errors import ConfigError
from nemotron4.inference.fake import FakeEngine
from nemotron4.server.app import create_app
from nemotron4.server.context import AccessLog
from nemotron4.server.page import FOLDER, PageTab
from nemotron4.server.settings import PageSettings, RemoteServer, ServerSettings
from nemotron4.text.prompt import nemotron4
from nemotron4.web import SHARED
from tests.server.conftest import InProcess

App = Callable[..., Any]
KEYS = ServerSettings(api_keys=("the-key",))
CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 5}


def test_the_page_allows_nothing_but_its_own_files(make_app: App) -> None:
    response = make_app().request("GET", "/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == "'none'"
    assert {value for name, value in policy.items() if name.endswith("-src")} == {"'self'"}
    assert policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cross-origin-opener-policy"] == "same-origin"


def test_every_file_that_the_page_names_is_there_and_none_is_elsewhere(make_app: App) -> None:
    app = make_app()
    html = app.request("GET", "/").text
    named = set(re.findall(r'(?:href|src)="(web/[^"]+)"', html))
    files = [path for folder in (FOLDER, SHARED) for path in folder.iterdir() if path.suffix != ".py"]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files if path.is_file()}
    scripts = "".join(text for name, text in texts.items() if name.endswith(".js"))
    named |= {f"web/{name}" for name in re.findall(r'from "\./([^"]+)"', scripts) if "vendor/" not in name}
    assert set(texts) == {name.removeprefix("web/") for name in named} | {"index.html"}
    for name in named:
        response = app.request("GET", f"/{name}")
        assert response.status_code == 200, name
        assert response.headers["content-type"].split(";")[0] in (
            "text/javascript",
            "text/css",
            "image/svg+xml",
        )
    sources = "".join(texts.values())
    assert not re.findall(r"(?<!xmlns=\")https?://(?!www\.w3\.org/2000/svg)", sources)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|style=\"", sources)


def test_other_people_s_files_are_served_as_they_were_published(make_app: App) -> None:
    app = make_app()
    vendor = FOLDER / "vendor"
    table = dict(
        re.findall(r"^\| `([^`]+)` .* `([0-9a-f]{64})` \|$", (vendor / "README.md").read_text(), re.M)
    )
    code = {path for path in vendor.rglob("*") if path.suffix not in (".md", ".txt") and path.is_file()}
    assert set(table) == {path.relative_to(vendor).as_posix() for path in code}
    for name, expected in table.items():
        response = app.request("GET", f"/web/vendor/{name}")
        assert hashlib.sha256(response.content).hexdigest() == expected, name
    scripts = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.js"))
    for name in re.findall(r'"\./vendor/([^"]+)"|"web/vendor/([^"]+)"', scripts):
        assert "".join(name) in table


@pytest.mark.parametrize(
    "path", ["/web/../app.py", "/web/%2e%2e/app.py", "/web/..%2fsettings.py", "/web//etc/passwd", "/web/"]
)
def test_only_the_files_of_the_page_are_served(make_app: App, path: str) -> None:
    assert make_app().request("GET", path).status_code == 404


def test_without_a_page_the_root_is_nemo_s_404(make_app: App) -> None:
    app = make_app(settings=ServerSettings(page=None))
    for path in ("/", "/web/app.js", "/page/info"):
        response = app.request("GET", path)
        assert (response.status_code, response.text[:15]) == (404, "<!doctype html>")


def test_the_page_needs_no_key_and_everything_it_asks_for_does(make_app: App) -> None:
    app = make_app(settings=KEYS, prompt_format=nemotron4())
    assert app.request("GET", "/").status_code == app.request("GET", "/web/app.js").status_code == 200
    for method, path in (
        ("GET", "/page/info"),
        ("GET", "/openapi.json"),
        ("POST", "/page/prompt"),
        ("PUT", "/"),
        ("POST", "/web/app.js"),
    ):
        assert app.request(method, path).status_code == 401, path
    key = {"Authorization": "Bearer the-key"}
    assert app.request("GET", "/page/info", headers=key).json()["has_chat"] is True


def test_the_page_learns_the_card_s_prompt_from_the_server(make_app: App) -> None:
    app = make_app(prompt_format=nemotron4())
    info = app.request("GET", "/page/info").json()
    assert info["card"]["prompt"].startswith("<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem")
    assert info["checkpoint"] == ""  # of the fake engine
    call = {"function": {"name": "f", "arguments": "{}"}}
    asked = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]}
    assert "<TOOLCALL>" in app.post("/page/prompt", asked).json()["prompt"]


def test_the_page_shows_the_description_of_the_checkpoint(make_app: App) -> None:
    app = make_app()
    described = replace(app.engine.info, checkpoint="gguf, 5 parameters stored as Q4_0 0.000 GB")
    app.engine._info = described
    expected = f"Checkpoint: {described.checkpoint}; computed in {described.dtype} on {described.device}."
    assert app.request("GET", "/page/info").json()["checkpoint"] == expected


def test_the_page_writes_the_card_s_prompt(make_app: App) -> None:
    app = make_app(prompt_format=nemotron4())
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
    ]
    answer = app.post("/page/prompt", {"messages": messages})
    assert answer.json() == {"prompt": "<extra_id_0>System\ns\n<extra_id_1>User\nq\n<extra_id_1>Assistant\n"}
    refused = app.post("/page/prompt", {"messages": [{"role": "user", "content": "a"}], "more": 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "more")
    refused = app.post("/page/prompt", {"messages": [{"role": "user", "content": "\ud800"}]})
    assert refused.status_code == 400
    assert "surrogate" in refused.json()["error"]["message"]


def test_the_openapi_page_says_what_a_field_left_out_is(make_app: App) -> None:
    schemas = make_app().request("GET", "/openapi.json").json()["components"]["schemas"]
    fields = schemas["ChatRequest"]["properties"]
    assert {name: field["x-default"] for name, field in fields.items() if "x-default" in field} == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
    }


@pytest.fixture
def other(serving: Any) -> Iterator[Any]:
    with serving(FakeEngine("the other one", name="other", prompt_format=nemotron4()), KEYS) as running:
        yield running


def test_a_second_model_answers_through_this_server_with_its_own_key(make_app: App, other: Any) -> None:
    settings = ServerSettings(api_keys=("mine",), compare_with=RemoteServer(f"{other.url}/v1", "the-key"))
    app = make_app("the first one", settings=settings, prompt_format=nemotron4())
    mine = {"Authorization": "Bearer mine"}
    info = app.request("GET", "/page/info", headers=mine).json()
    assert info["other"] == {"name": "other", "error": None}
    answer = app.post("/page/compare", {**CHAT, "max_tokens": 20}, **mine)
    assert answer.json()["choices"][0]["message"]["content"] == "the other one"
    streamed = app.post("/page/compare", {**CHAT, "stream": True}, **mine)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")
    refused = app.post("/page/compare", {**CHAT, "temperature": 9}, **mine)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    assert app.post("/page/compare", CHAT).status_code == 401


def test_a_second_model_that_is_gone_is_said(make_app: App, other: Any) -> None:
    settings = ServerSettings(compare_with=RemoteServer("http://127.0.0.1:9"))
    app = make_app(settings=settings, prompt_format=nemotron4())
    assert "does not answer" in app.request("GET", "/page/info").json()["other"]["error"]
    assert app.post("/page/compare", CHAT).status_code == 502
    without_key = ServerSettings(compare_with=RemoteServer(other.url))
    app = make_app(settings=without_key, prompt_format=nemotron4())
    assert "answered 401" in app.request("GET", "/page/info").json()["other"]["error"]


def test_a_redirect_of_the_other_server_is_not_followed(make_app: App, serving_app: Any) -> None:
    async def leave(_: Request) -> JSONResponse:
        return JSONResponse({}, 307, {"Location": "http://127.0.0.1:1/secret"})

    with serving_app(Starlette(routes=[Route("/v1/chat/completions", leave, methods=["POST"])])) as url:
        app = make_app(settings=ServerSettings(compare_with=RemoteServer(url)), prompt_format=nemotron4())
        answer = app.post("/page/compare", CHAT)
    assert (answer.status_code, answer.headers.get("location")) == (307, None)


def test_scores_come_from_the_reward_model_s_server(make_app: App, serving_app: Any) -> None:
    async def score(request: Request) -> JSONResponse:
        body = json.loads(await request.body())
        return JSONResponse({"attributes": {"helpfulness": 3.5}, "reward": len(body["messages"]), "raw": []})

    with serving_app(Starlette(routes=[Route("/score", score, methods=["POST"])])) as url:
        app = make_app(settings=ServerSettings(reward_model=RemoteServer(url)))
        assert app.request("GET", "/page/info").json()["has_reward"] is True
        assert app.post("/score", {"messages": [1, 2]}).json()["reward"] == 2
    assert make_app().post("/score", {}).status_code == 405  # NeMo's answer on a path that is not there


@pytest.mark.parametrize("url", ["localhost:1424", "ftp://host", ""])
def test_an_address_of_another_server_is_checked(url: str) -> None:
    with pytest.raises(ConfigError, match="not the address of a server"):
        RemoteServer(url)


def test_a_key_is_not_in_what_settings_print() -> None:
    assert "secret" not in repr(ServerSettings(compare_with=RemoteServer("http://x", "secret")))


def test_the_page_s_own_port_asks_for_the_login_and_the_other_does_not() -> None:
    page = PageSettings(port=9889, login=("ann", "p:ss"))
    app = create_app(FakeEngine("b"), ServerSettings(page=page), access_log=AccessLog(io.StringIO()))

    def get(port: int, **arguments: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url=f"http://127.0.0.1:{port}") as client:
                return await client.get("/", **arguments)

        return asyncio.run(send())

    assert get(1424).status_code == 200
    refused = get(9889)
    assert (refused.status_code, refused.headers["www-authenticate"][:5]) == (401, "Basic")
    assert get(9889, auth=("ann", "wrong")).status_code == 401
    assert get(9889, auth=("ann", "p:ss")).status_code == 200


def test_a_tab_gets_its_script_its_app_and_the_same_front_door(tmp_path: Path) -> None:
    async def rows(request: Request) -> JSONResponse:
        return JSONResponse({"size": len(await request.body())})

    script = tmp_path / "notes.js"
    script.write_text("export function mount() {}")
    router = APIRouter(prefix="/notes", routes=[Route("/notes/rows", rows, methods=["GET", "POST"])])
    tab = PageTab(name="notes", title="Notes", script=script, router=router)
    app = InProcess(FakeEngine(), ServerSettings(api_keys=("the-key",), max_body_bytes=100), tabs=[tab])
    key = {"Authorization": "Bearer the-key"}
    assert app.request("GET", "/page/info", headers=key).json()["tabs"] == [
        {"name": "notes", "title": "Notes"}
    ]
    assert app.request("GET", "/web/notes.js").text == "export function mount() {}"
    assert app.request("GET", "/notes/rows").status_code == 401
    assert app.request("GET", "/notes/rows", headers=key).json() == {"size": 0}
    assert app.request("POST", "/notes/rows", headers=key, content=b"x" * 101).status_code == 413
    foreign = {**key, "Origin": "http://evil.example"}
    assert app.request("POST", "/notes/rows", headers=foreign, content=b"x").status_code == 403
    assert InProcess(FakeEngine()).request("GET", "/notes/rows").status_code == 404
