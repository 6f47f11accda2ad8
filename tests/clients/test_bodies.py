"""What programs send whose library is too large for a test, or that are none, is answered without a warning.

``recorded.jsonl`` was recorded off the wire on 30 November 2026; the scripted engine answered:
nemo-skills: its VLLMModel and ToolCallingWrapper at 8b18f39, with litellm 1.77.5.
vercel: ai 6.0.326 with @ai-sdk/openai-compatible 2.0.92.
librechat: @librechat/agents 3.2.21, which sends what LibreChat asks, with the settings of its packages/api.
open-webui: 0.12.4 in a browser. The first body with tools has all 36, the others those that were called.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from nemotron4.server.app import create_app
from nemotron4.server.context import AccessLog
from nemotron4.server.settings import ServerSettings
from tests.clients.scripted import scripted_engine

RECORDED = Path(__file__).with_name("recorded.jsonl").read_text(encoding="utf-8").splitlines()
CASES = [(row["program"], row["route"], row["body"]) for row in map(json.loads, RECORDED)]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    settings = ServerSettings(served_names=("nemotron",), unknown_fields="refuse")
    app = create_app(scripted_engine(65_536), settings, access_log=AccessLog(StringIO()))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


@pytest.mark.parametrize(
    ("name", "route", "body"), CASES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(CASES)]
)
def test_the_body_is_answered(client: TestClient, name: str, route: str, body: dict[str, Any]) -> None:
    answer = client.post(route, json={"model": "nemotron", **body})
    assert answer.status_code == 200, answer.text
    assert "warning" not in answer.headers
    if body.get("stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        tools = [tool["function"]["name"] for tool in body.get("tools") or ()]
        if "get_weather" in tools:
            assert ("tool_calls" in answer.text) == (body["messages"][-1]["role"] != "tool")
    elif route == "/v1/embeddings":
        assert len(answer.json()["data"]) == len(body["input"])
    else:
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")


def test_each_program_has_five_journeys() -> None:
    programs = {name: [n for n, _, _ in CASES].count(name) for name, _, _ in CASES}
    assert set(programs) == {"nemo-skills", "vercel", "librechat", "open-webui"}
    assert min(programs.values()) >= 5
