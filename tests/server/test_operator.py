"""Health, metrics, access log, API keys, Host header, limits: what an operator relies on."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nemotron4.errors import ConfigError
from nemotron4.server.settings import ServerSettings, read_api_keys
from nemotron4.text.prompt import nemotron4

App = Callable[..., Any]
BODY = {"sentences": ["a very secret prompt"], "tokens_to_generate": 3, "greedy": True}


def _metrics(app: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(app.request("GET", "/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_health_names_the_model(make_app: App) -> None:
    response = make_app(name="m").request("GET", "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok", "model": "m"})
    assert make_app().request("HEAD", "/health").status_code == 200


def test_metrics_count_tokens_requests_and_latencies(make_app: App) -> None:
    app = make_app("abc")
    app.generate(BODY)
    app.generate({**BODY, "temperature": -1})
    app.request("PUT", "/no/such/path")
    found = _metrics(app)
    num_prompt = len(app.engine.tokenizer.encode(BODY["sentences"][0]))
    assert found["nemotron4_prompt_tokens_total", ()] == num_prompt
    assert found["nemotron4_generated_tokens_total", ()] == 3
    assert found["nemotron4_requests_finished_total", ()] == 1
    guesses = ("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total")
    for name in ("requests_running", "requests_waiting", "cache_blocks_used", "preemptions_total", *guesses):
        assert found[f"nemotron4_{name}", ()] == 0
    assert found["nemotron4_cache_blocks_total", ()] > 0
    for name in ("time_to_first_token", "time_per_output_token", "row"):
        assert found[f"nemotron4_{name}_seconds_count", ()] == 1

    def requests(method: str, route: str, status: str) -> float:
        labels = (("method", method), ("route", route), ("status", status))
        return found["nemotron4_http_requests_total", labels]

    assert requests("PUT", "/generate", "200") == 2
    assert requests("PUT", "other", "405") == 1


def test_two_apps_count_apart(make_app: App) -> None:
    one, two = make_app("a"), make_app("a")
    one.generate(BODY)
    assert _metrics(two)["nemotron4_generated_tokens_total", ()] == 0


def test_the_access_log_has_numbers_and_no_text(make_app: App) -> None:
    app = make_app("a secret answer", context_length=10_000)
    response = app.generate({**BODY, "tokens_to_generate": 500}, **{"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    (line,) = app.log_lines()
    assert line["ms"] > 0
    del line["time"], line["ms"]
    assert line == {
        "request_id": "mine-1",
        "method": "PUT",
        "path": "/generate",
        "status": 200,
        "prompt_tokens": len(app.engine.tokenizer.encode(BODY["sentences"][0])),
        "new_tokens": len(app.engine.tokenizer.encode("a secret answer")) + 1,
        "finish_reasons": ["stop"],
    }
    assert "secret" not in app.log.getvalue()


def test_a_request_id_that_could_forge_a_log_is_replaced(make_app: App) -> None:
    response = make_app().request("GET", "/health", headers={"X-Request-Id": "a b\tc"})
    assert response.headers["x-request-id"].isalnum()


KEYS = ServerSettings(api_keys=("first-key", "second-key"))


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer first-ke", 401),
        ("Bearer ", 401),
        ("first-key", 401),
        ("Basic first-key", 401),
        ("Bearer first-key", 200),
        ("bearer second-key", 200),
    ],
)
def test_one_of_the_api_keys_is_asked_for(make_app: App, authorization: str | None, status: int) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    app = make_app("b", settings=KEYS)
    for method, path in (("GET", "/v1/models"), ("GET", "/metrics")):
        response = app.request(method, path, headers=headers)
        assert response.status_code == status
    assert app.generate(BODY, **headers).status_code == status
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert isinstance(app.generate(BODY, **headers).json(), str)


def test_health_needs_no_key(make_app: App) -> None:
    assert make_app(settings=KEYS).request("GET", "/health").status_code == 200


def test_a_key_file_has_one_key_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# for alice\nkey-1\n\n  key-2  \n")
    assert read_api_keys(path) == ("key-1", "key-2")


@pytest.mark.parametrize("content", [b"", b"# none\n", b"two words\n", b"\xff\xfe\n", "schlüssel\n".encode()])
def test_a_bad_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="keys"):
        read_api_keys(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_api_keys(tmp_path / "absent")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1424", 200),
        ("127.0.0.1:1424", 200),
        ("[::1]:1424", 200),
        ("0.0.0.0:1424", 200),
        ("192.168.1.7", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("evil.example:1424", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("proxy.example", 200),
    ],
)
def test_a_loopback_server_answers_to_addresses_and_allowed_names(
    make_app: App, host: str, status: int
) -> None:
    app = make_app(settings=ServerSettings(allowed_hosts=("proxy.example",)))
    assert app.request("GET", "/v1/models", headers={"Host": host}).status_code == status


def test_a_server_on_a_network_address_answers_to_every_name(make_app: App) -> None:
    app = make_app(settings=ServerSettings(host="0.0.0.0"))
    assert app.request("GET", "/v1/models", headers={"Host": "node7.cluster"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:1424", "http://127.0.0.1:1424", 200),
        ("localhost:1424", "http://localhost:1424", 200),
        ("127.0.0.1:1424", "https://proxy.example", 200),
        ("127.0.0.1:1424", "http://evil.example", 403),
        ("127.0.0.1:1424", "http://127.0.0.1:8888", 403),
        ("127.0.0.1:1424", "http://localhost:1424", 403),
        ("127.0.0.1:1424", "null", 403),
    ],
)
@pytest.mark.parametrize("listens_on", ["127.0.0.1", "0.0.0.0"])
def test_a_page_of_another_origin_can_neither_use_the_server_nor_read_answers(
    make_app: App, listens_on: str, host: str, origin: str, status: int
) -> None:
    app = make_app("b", settings=ServerSettings(host=listens_on, allowed_hosts=("proxy.example",)))
    response = app.generate(BODY, Host=host, Origin=origin)
    assert response.status_code == status
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert app.engine.stats().requests_finished_total == (status == 200)


def test_a_body_that_a_page_may_send_without_asking_is_refused(make_app: App) -> None:
    app = make_app("b", prompt_format=nemotron4())
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": []})):
        response = app.request("POST", path, content=json.dumps(body), headers={"Content-Type": "text/plain"})
        assert response.status_code == 400, path
    assert app.engine.stats().prompt_tokens_total == 0


def test_a_compressed_body_is_not_inflated(make_app: App) -> None:
    bomb = gzip.compress(b'{"prompt": "' + b"a" * 10_000_000 + b'"}')
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    app = make_app("b")
    assert app.request("POST", "/v1/completions", content=bomb, headers=headers).status_code == 400
    assert app.request("PUT", "/generate", content=bomb, headers=headers).status_code == 400


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/other"])
def test_a_body_over_the_limit_is_413(make_app: App, path: str) -> None:
    app = make_app("b", settings=ServerSettings(max_body_bytes=100))
    method = "PUT" if path == "/generate" else "POST"
    headers = {"Content-Type": "application/json"}
    response = app.request(method, path, content=b"x" * 101, headers=headers)
    assert response.status_code == 413
    assert "100" in response.text
    assert app.generate({"sentences": ["a"], "tokens_to_generate": 1}).status_code == 200


def test_a_body_that_does_not_arrive_is_408(make_app: App) -> None:
    app = make_app(settings=ServerSettings(body_timeout_s=0.01))

    async def never() -> Any:
        yield b'{"sent'
        await asyncio.sleep(60)

    response = app.request("PUT", "/generate", content=never(), headers={"Content-Type": "application/json"})
    assert response.status_code == 408


def test_a_draining_server_refuses_with_503(make_app: App) -> None:
    app = make_app("b")
    app.app.state.service.gate.is_draining = True
    refused = app.generate(BODY)
    assert (refused.status_code, refused.headers["connection"]) == (503, "close")
    assert app.post("/v1/completions", {"prompt": "a"}).json()["error"]["type"] == "server_error"
    health = app.request("GET", "/health")
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    assert app.request("GET", "/metrics").status_code == 200


def test_an_engine_that_closes_answers_503(make_app: App) -> None:
    app = make_app("b")
    app.engine.close()
    assert app.generate(BODY).status_code == 503


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/images", 404),
        ("GET", "/v1", 404),
    ],
)
def test_unknown_openai_routes_answer_in_openai_s_form(
    make_app: App, method: str, path: str, status: int
) -> None:
    response = make_app().request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("values", [{"nemo_compat": "loose"}, {"max_body_bytes": 0}, {"send_timeout_s": -1}])
def test_impossible_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerSettings(**values)
