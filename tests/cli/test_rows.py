"""Rows of ``generate`` that ask for a form."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron4.cli.batch import as_json
from nemotron4.cli.rows import read_request, read_schema
from nemotron4.engine import SamplingParams
from nemotron4.errors import DataError, RequestError
from nemotron4.inference.fake import FakeEngine
from nemotron4.text.structured_output import json_schema


def test_a_row_and_a_file_name_the_schema_of_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "integer"}')
    params = SamplingParams(grammar=read_schema(path))
    assert params.grammar == json_schema('{"type": "integer"}')
    assert as_json(params)["grammar"]["kind"] == "json"
    engine = FakeEngine()
    assert read_request(engine, {"prompt": "x"}, params).params.grammar == params.grammar
    row = {"prompt": "x", "json_schema": {"type": "boolean"}}
    assert read_request(engine, row, params).params.grammar == json_schema({"type": "boolean"})
    with pytest.raises(RequestError, match="Invalid type: text"):
        read_request(engine, {"prompt": "x", "json_schema": {"type": "text"}}, params)
    with pytest.raises(DataError, match="cannot be read"):
        read_schema(tmp_path / "none.json")
