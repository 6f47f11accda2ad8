"""Adapters of a running server: chosen by the model's name, loaded and unloaded with the key."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import nemotron4
from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.adapter_base import write_base
from nemotron4.cli.main import main
from nemotron4.cli.serve import split_adapters
from nemotron4.errors import ConfigError
from nemotron4.inference.fake import FakeEngine
from nemotron4.server.app import create_app
from nemotron4.server.context import AccessLog
from nemotron4.server.settings import ServerSettings
from tests import tiny_models
from tests.inference.test_adapters import write_lora

KEYED = ServerSettings(api_keys=("k",), served_names=("base",))
HEADERS = {"Authorization": "Bearer k"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("adapters")
    base = tiny_models.llama_directory(folder / "llama")
    one, two = (write_lora(base, folder / name, seed=seed) for seed, name in enumerate(("one", "two")))
    with nemotron4.load(base, adapters={"one": one}) as engine:
        app = create_app(engine, KEYED, access_log=AccessLog(io.StringIO()))
        with TestClient(app, base_url="http://localhost", headers=HEADERS) as client:
            client.two = two  # type: ignore[attr-defined]
            yield client


def answer(client: TestClient, model: str | None) -> Any:
    body = {"prompt": "hello", "max_tokens": 6, "temperature": 0, "model": model, "ignore_eos": True}
    return client.post("/v1/completions", json=body)


def text(client: TestClient, model: str | None) -> str:
    response = answer(client, model)
    assert response.json()["model"] == (model or "base"), response.text
    found: str = response.json()["choices"][0]["text"]
    return found


def test_the_models_name_chooses_and_adapters_come_and_go(client: TestClient) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("base", None), ("one", "base")]
    assert text(client, "base") == text(client, None) != text(client, "one")
    assert answer(client, "two").status_code == 404
    body = {"lora_name": "two", "lora_path": str(client.two)}  # type: ignore[attr-defined]
    loaded = client.post("/v1/load_lora_adapter", json=body)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'two' added successfully.")
    assert len({text(client, name) for name in ("base", "one", "two")}) == 3
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 400
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 200
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 404
    assert answer(client, "two").status_code == 404
    chat = {"model": "one", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    assert client.post("/v1/chat/completions", json=chat).json()["model"] == "one"
    vectors = [
        client.post("/v1/embeddings", json={"input": "hi", "model": name}).json()["data"][0]["embedding"]
        for name in ("base", "one")
    ]
    assert vectors[0] != vectors[1]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"lora_name": "base", "lora_path": "x"}, 400, "The name 'base' is taken"),
        ({"lora_name": "new", "lora_path": "/no/such/folder"}, 400, "cannot be read"),
        ({"lora_name": "new"}, 400, "lora_path: Field required"),
        ({"lora_name": "new", "lora_path": "x" * 5000}, 400, "File name too long"),
        (
            {"lora_name": "new", "lora_path": "x", "force": True},
            400,
            "'force'; known: load_inplace, lora_name",
        ),
    ],
)
def test_what_cannot_be_loaded_is_refused(client: TestClient, body: Any, status: int, words: str) -> None:
    refused = client.post("/v1/load_lora_adapter", json=body)
    assert refused.status_code == status
    assert words in refused.json()["error"]["message"], refused.text


def test_the_model_and_an_adapter_cannot_share_a_name(client: TestClient) -> None:
    engine = client.app.state.service.engine  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="are both called 'one'"):
        create_app(engine, ServerSettings(served_names=("base", "one")))


def test_adapters_are_changed_with_a_key_only(client: TestClient) -> None:
    body = {"lora_name": "new", "lora_path": "x"}
    wrong = client.post("/v1/load_lora_adapter", json=body, headers={"Authorization": "Bearer no"})
    assert wrong.status_code == 401
    app = create_app(FakeEngine(), ServerSettings(), access_log=AccessLog(io.StringIO()))
    with TestClient(app, base_url="http://localhost") as open_client:
        refused = open_client.post("/v1/load_lora_adapter", json=body)
    assert refused.status_code == 403
    assert "--api-key-file" in refused.json()["error"]["message"]


def test_an_adapter_of_another_base_is_refused_by_the_bases_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, other = (tiny_models.llama_directory(tmp_path / name, seed=seed) for seed, name in enumerate("ab"))
    adapter = write_lora(base, tmp_path / "adapter", seed=1)
    write_base(adapter, open_checkpoint(base), str(base), {})
    for command in (["serve", "--port", "0"], ["chat"]):
        assert main([*command, str(other), "--adapter", str(adapter)]) == 1
        assert f"was trained on {base}, and this is {other}" in capsys.readouterr().err
    assert main(["serve", "--port", "0", str(other), "--adapter", f"mine={adapter}"]) == 1
    assert f"was trained on {base}" in capsys.readouterr().err


def test_the_option_merges_one_or_names_several(tmp_path: Path) -> None:
    odd = tmp_path / "a=b"
    odd.mkdir()
    assert split_adapters([]) == ("auto", None)
    assert split_adapters(["none"]) == ("none", None)
    assert split_adapters([], is_enabled=True) == split_adapters(["none"], is_enabled=True) == ("none", {})
    assert split_adapters(["folder"]) == ("folder", None)
    assert split_adapters([str(odd)]) == (str(odd), None)
    assert split_adapters(["x=one", "y=two"]) == ("none", {"x": "one", "y": "two"})
    for given in (["folder", "x=one"], ["one", "two"]):
        with pytest.raises(ConfigError, match="one alone is merged"):
            split_adapters(given)
    for given in (["x="], ["=p"], ["x=one", "x=two"]):
        with pytest.raises(ConfigError, match="expected NAME=PATH"):
            split_adapters(given)
