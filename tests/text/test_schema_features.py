"""Which schemas are followed, which are refused (docs/serving.md counts them); what is followed validates."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nemotron4.engine import SamplingParams, SamplingRequest
from nemotron4.errors import RequestError
from nemotron4.inference.fake import FakeEngine
from nemotron4.text.answers import run
from nemotron4.text.structured_output import json_schema
from tests.text.schema_features import FEATURES

REFUSED = {
    *("propertyNames", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties"),
    *("uniqueItems", "contains", "minContains", "unevaluatedItems", "not", "if, then, else"),
    *("pattern with look-ahead", "pattern with a back reference", "oneOf that overlap"),
    *("$ref elsewhere", "$dynamicRef"),
    *(f"format {name}" for name in ("uri-reference", "uri-template", "iri", "idn-email", "json-pointer")),
    *(f"format {name}" for name in ("regex", "byte", "color")),
}

ENGINE = FakeEngine()


def test_the_refused_features_are_those_that_the_page_counts() -> None:
    refused = set()
    for name, schema in FEATURES.items():
        try:
            json_schema(schema)
        except RequestError:
            refused.add(name)
    assert refused == REFUSED
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    assert f"{len(FEATURES) - len(REFUSED)} of {len(FEATURES)} are followed" in page


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in REFUSED])
def test_what_is_followed_validates(name: str) -> None:
    schema = FEATURES[name]
    kind: Any = jsonschema.Draft4Validator if "draft 4" in name else jsonschema.Draft202012Validator

    async def documents() -> list[str]:
        found = []
        for seed in range(4):
            params = SamplingParams(max_new_tokens=120, grammar=json_schema(schema), seed=seed)
            answer = await run(ENGINE, SamplingRequest((65,), params))
            found += [answer.text] if answer.finish_reason == "stop" else []
        return found

    for text in asyncio.run(documents()):
        if name == "multipleOf a fraction":  # which jsonschema divides in binary
            assert Decimal(text) % Decimal("0.01") == 0
        else:
            kind(schema).validate(json.loads(text))
