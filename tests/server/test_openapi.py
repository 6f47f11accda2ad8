"""The OpenAPI page describes what the server does: requests made from it are answered as it says."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    response_schema_conformance,
    status_code_conformance,
)

from nemotron4.inference.fake import FakeEngine
from nemotron4.server.app import create_app
from nemotron4.text.prompt import nemotron4

ENGINE = FakeEngine("fine", prompt_format=nemotron4(), context_length=600)
APP = create_app(ENGINE)
schema = schemathesis.openapi.from_asgi("/openapi.json", APP, headers={"Host": "localhost"})


@schema.parametrize()
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_generated_requests_are_answered_as_documented(case: Any) -> None:
    case.headers = {**(case.headers or {}), "Host": "localhost"}
    case.call_and_validate(checks=[not_a_server_error, status_code_conformance, response_schema_conformance])
    stats = ENGINE.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)


@pytest.mark.parametrize(
    "path",
    ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models", "/health"],
)
def test_every_route_is_on_the_page(path: str) -> None:
    assert path in APP.openapi()["paths"]
