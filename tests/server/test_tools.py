"""Tools on ``/v1/chat/completions``: rendered, called, streamed, and a whole loop of the openai client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

import nemotron4
from nemotron4.engine import SamplingParams
from nemotron4.inference.fake import FakeEngine
from nemotron4.records import Message
from nemotron4.server.openai_tools import ToolFields, asked_tools
from nemotron4.server.settings import ServerSettings
from nemotron4.text.prompt import nemotron4 as card_format
from nemotron4.text.tools import read_calls

App = Callable[..., Any]
ROUTE = "/v1/chat/completions"
HI = [{"role": "user", "content": "Weather in Rome?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Rome", "unit": "C"}}]</TOOLCALL>'


def agent(prompt: str) -> str:
    return "It is 20 C in Rome." if '[{"degrees": 20}]' in prompt else f"I look.\n{CALL}"


def test_an_agent_loop_of_the_openai_client(serving: Any) -> None:
    with serving(FakeEngine(agent, prompt_format=card_format())) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
        messages: list[Any] = list(HI)
        for _ in range(3):
            answer = client.chat.completions.create(
                model="fake", messages=messages, tools=[WEATHER], temperature=0
            )  # type: ignore[list-item]
            message = answer.choices[0].message
            messages.append(message)
            if not message.tool_calls:
                break
            assert answer.choices[0].finish_reason == "tool_calls"
            for call in message.tool_calls:
                assert call.type == "function"
                arguments = json.loads(call.function.arguments)
                assert (call.function.name, arguments) == ("get_weather", {"city": "Rome", "unit": "C"})
                messages.append({"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 20}'})
        assert message.content == "It is 20 C in Rome."
        assert len(messages) == 4


def test_a_stream_sends_the_text_and_then_each_call(serving: Any) -> None:
    with serving(FakeEngine(agent, prompt_format=card_format())) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
        text, calls, reasons = "", [], []
        for chunk in client.chat.completions.create(
            model="fake",
            messages=HI,
            tools=[WEATHER],
            temperature=0,
            stream=True,  # type: ignore[arg-type,list-item]
        ):
            text += chunk.choices[0].delta.content or ""
            calls += chunk.choices[0].delta.tool_calls or []
            reasons.append(chunk.choices[0].finish_reason)
    assert text == "I look."
    assert [(call.index, call.function.name) for call in calls] == [(0, "get_weather")]
    assert json.loads(calls[0].function.arguments) == {"city": "Rome", "unit": "C"}
    assert reasons[-1] == "tool_calls"


def test_a_stream_has_the_log_probabilities_of_its_calls(make_app: App) -> None:
    app = make_app(CALL, prompt_format=card_format())
    body = {"messages": HI, "tools": [WEATHER], "temperature": 0, "logprobs": True}
    [whole] = app.post(ROUTE, body).json()["choices"]
    lines = app.post(ROUTE, {**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = [each for part in parts if part for each in part["content"]]
    assert streamed == whole["logprobs"]["content"] != []


@pytest.mark.parametrize("form", [None, "hermes", "llama3", "mistral", "nemotron"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_come_comes_and_validates(make_app: App, form: str | None, choice: Any) -> None:
    app = make_app(None, prompt_format=card_format(), settings=ServerSettings(tool_format=form))
    bias = {str(app.engine.tokenizer.encode(text)[0]): 12 for text in '"}]'}
    body = {"messages": HI, "tools": [WEATHER, TIME], "tool_choice": choice, "seed": 3, "logit_bias": bias}
    answer = app.post(ROUTE, {**body, "max_tokens": 900, "parallel_tool_calls": False})
    assert answer.status_code == 200, answer.text
    [made] = answer.json()["choices"]
    assert (made["finish_reason"], made["message"]["content"]) == ("tool_calls", None), made
    [call] = made["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    if call["function"]["name"] == "get_weather":
        jsonschema.validate(json.loads(call["function"]["arguments"]), CITY)
    else:
        assert choice == "required"


def test_without_a_choice_the_model_may_just_answer(make_app: App) -> None:
    seen: list[str] = []
    app = make_app(lambda prompt: seen.append(prompt) or "Warm.\n", prompt_format=card_format())
    for extra in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        answer = app.post(ROUTE, {"messages": HI, "tools": [WEATHER], "temperature": 0, **extra}).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": "Warm.", "refusal": None}
        assert answer["choices"][0]["finish_reason"] == "stop"
    assert ["<AVAILABLE_TOOLS>" in prompt for prompt in seen] == [True, True, False]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "names 'x'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [WEATHER], "json_schema": {"type": "object"}}, "exclude each other"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"not": {}}}}
                ]
            },
            "tool 'f'",
        ),
    ],
)
def test_what_cannot_be_is_refused(make_app: App, body: dict[str, Any], message: str) -> None:
    answer = make_app("x", prompt_format=card_format()).post(ROUTE, {"messages": HI, **body})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.demo_model
def test_the_demo_model_must_call_and_its_calls_validate(demo_model: Path) -> None:
    body = ToolFields.model_validate({"tools": [WEATHER, TIME], "tool_choice": "required"})
    messages = [Message("user", "What is the weather in Rome?")]
    with nemotron4.load(str(demo_model)) as engine:
        own = engine.prompt_format
        assert own is not None
        asked = asked_tools(body, messages, own, None)
        assert asked is not None
        params = [SamplingParams(max_new_tokens=150, temperature=0, seed=i) for i in range(1)]
        made = engine.generate_each([asked.request(engine, messages, each, own=own) for each in params])
    for each in made:
        text, calls = read_calls(each.text, asked.form)
        assert (each.finish_reason, text) == ("stop", "")
        assert calls
        for call in calls:
            if call.name == "get_weather":
                jsonschema.validate(json.loads(call.arguments), CITY)
