"""Structured output on the OpenAI routes, by the fields of OpenAI, vLLM and llama.cpp."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import openai
import pytest

from nemotron4.inference.fake import FakeEngine
from nemotron4.text.prompt import nemotron4

App = Callable[..., Any]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Rome", "Bern"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["city", "size"],
    "additionalProperties": False,
}
LETTER = {"type": "string", "enum": ["A", "B"]}
HI = [{"role": "user", "content": "hi"}]
OUTPUTS = "structured_outputs"


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": LETTER}}},
            '"[AB]"',
        ),
        ({"response_format": {"type": "json_object", "schema": LETTER}}, '"[AB]"'),
        ({OUTPUTS: {"json": LETTER}}, '"[AB]"'),
        ({OUTPUTS: {"json": json.dumps(LETTER)}}, '"[AB]"'),
        ({OUTPUTS: {"choice": ["[[A]]", "[[B]]"]}}, r"\[\[[AB]\]\]"),
        ({OUTPUTS: {"regex": "[0-9]{3}"}}, r"\d{3}"),
        ({OUTPUTS: {"grammar": 'root ::= "yes" | "no"'}}, "yes|no"),
        ({"guided_json": LETTER}, '"[AB]"'),
        ({"nvext": {"guided_json": LETTER}}, '"[AB]"'),
        ({"guided_regex": "[0-9]{3}"}, r"\d{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_grammar": 'start: "yes" | "no"'}, "yes|no"),
        ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ({"json_schema": LETTER}, '"[AB]"'),
        ({"json_schema": json.dumps(LETTER)}, '"[AB]"'),
    ],
)
def test_every_field_gives_the_form_on_both_routes(make_app: App, fields: dict[str, Any], form: str) -> None:
    app = make_app(None, prompt_format=nemotron4())
    for path, prompt in (("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "hi"})):
        answer = app.post(path, {**prompt, **fields, "max_tokens": 50, "seed": 1})
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        assert re.fullmatch(form, text), text
        assert choice["finish_reason"] == "stop"


def test_text_format_and_nulls_ask_for_nothing(make_app: App) -> None:
    app = make_app("plain words", prompt_format=nemotron4())
    fields = {"response_format": {"type": "text"}, "guided_json": None, OUTPUTS: None, "grammar": None}
    answer = app.post("/v1/chat/completions", {"messages": HI, "temperature": 0, **fields}).json()
    assert answer["choices"][0]["message"]["content"] == "plain words"
    unset: dict[str, Any] = dict.fromkeys(
        ["json", "regex", "grammar", "whitespace_pattern", "structural_tag"]
    )
    unset |= dict.fromkeys(["disable_fallback", "disable_additional_properties"], False)  # vLLM's, in full
    answer = app.post("/v1/chat/completions", {"messages": HI, OUTPUTS: {**unset, "choice": ["b"]}}).json()
    assert answer["choices"][0]["message"]["content"] == "b"
    wrong = app.post("/v1/chat/completions", {"messages": HI, OUTPUTS: {"jsn": {}}}).json()
    assert "did you mean 'json'?" in wrong["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"guided_json": {"not": {}}}, 'Unimplemented keys: ["not"]', "guided_json"),
        ({"guided_regex": "(a"}, "unclosed group", "guided_regex"),
        ({"guided_choice": []}, "expected one text or more", "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "both ask for a form", "guided_choice"),
        ({"response_format": {"type": "json_schema"}}, "needs a schema", "response_format"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_a_token(
    make_app: App, fields: dict[str, Any], message: str, param: str
) -> None:
    app = make_app(None, prompt_format=nemotron4())
    answer = app.post("/v1/chat/completions", {"messages": HI, **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param
    assert app.engine.stats().generated_tokens_total == 0


def test_a_document_that_the_limit_cuts_says_so(make_app: App) -> None:
    app = make_app(None, prompt_format=nemotron4())
    answer = app.post("/v1/chat/completions", {"messages": HI, "json_schema": SCHEMA, "max_tokens": 4}).json()
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_openai_client_parses_a_model_also_from_a_stream(serving: Any) -> None:
    from pydantic import BaseModel

    class Place(BaseModel):
        city: str
        size: int

    script = '{"city": "Rome", "size": 7}'
    with serving(FakeEngine(script, prompt_format=nemotron4())) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
        made = client.chat.completions.parse(model="fake", messages=HI, response_format=Place, temperature=0)  # type: ignore[arg-type]
        assert made.choices[0].message.parsed == Place(city="Rome", size=7)
        with client.chat.completions.stream(model="fake", messages=HI, response_format=Place) as stream:  # type: ignore[arg-type]
            final = stream.get_final_completion()
        jsonschema.validate(json.loads(final.choices[0].message.content or ""), Place.model_json_schema())
