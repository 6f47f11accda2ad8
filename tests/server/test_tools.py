"""Tools on ``/v1/chat/completions``: rendered, called, streamed, and a whole loop of the openai client."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from openai.types.chat import ChatCompletionMessageCustomToolCall

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


CODE = {"type": "custom", "custom": {"name": "run_code", "description": "Runs Python."}}
RUN = '<TOOLCALL>[{"name": "run_code", "arguments": {"input": "print(1)\\n"}}]</TOOLCALL>'


def coder(prompt: str) -> str:
    return "It printed 1." if "[1]</TOOL_RESPONSE>" in prompt else RUN


def test_a_custom_tool_takes_a_text_in_a_whole_loop_of_the_openai_client(serving: Any) -> None:
    with serving(FakeEngine(coder, prompt_format=card_format())) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
        asked: dict[str, Any] = {"model": "fake", "tools": [CODE, WEATHER], "temperature": 0}
        answer = client.chat.completions.create(messages=HI, **asked)
        [choice] = answer.choices
        [call] = choice.message.tool_calls or []
        assert choice.finish_reason == "tool_calls"
        assert isinstance(call, ChatCompletionMessageCustomToolCall)
        assert (call.custom.name, call.custom.input) == ("run_code", "print(1)\n")
        said = [*HI, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "1"}]
        last = client.chat.completions.create(messages=said, **asked)
        assert last.choices[0].message.content == "It printed 1."
        parts = []
        for chunk in client.chat.completions.create(messages=HI, stream=True, **asked):
            parts += chunk.choices[0].delta.tool_calls or []
    [part] = [part.model_dump() for part in parts]
    assert (part["type"], part["custom"]) == ("custom", {"name": "run_code", "input": "print(1)\n"})


@pytest.mark.parametrize("form", [None, "hermes", "llama3", "mistral"])
def test_the_format_of_a_custom_tool_holds(make_app: App, form: str | None) -> None:
    app = make_app(None, prompt_format=card_format(), settings=ServerSettings(tool_format=form))
    rule = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-c]{2}|x"}}
    tool = {"type": "custom", "custom": {"name": "pick", "format": rule}}
    choice = {"type": "custom", "custom": {"name": "pick"}}
    body = {"messages": HI, "tools": [tool, TIME], "tool_choice": choice, "seed": 3, "max_tokens": 900}
    answer = app.post(ROUTE, body)
    assert answer.status_code == 200, answer.text
    [call] = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["type"] == "custom"
    assert re.fullmatch("[a-c]{2}|x", call["custom"]["input"])


@pytest.mark.parametrize("mode", ["auto", "required"])
@pytest.mark.parametrize("name", ["get_time", "get_weather"])
def test_allowed_tools_are_all_that_may_be_called_and_all_are_shown(
    make_app: App, mode: str, name: str
) -> None:
    seen: list[str] = []

    def script(prompt: str) -> str:
        seen.append(prompt)
        return f'<TOOLCALL>[{{"name": "{name}", "arguments": {{}}}}]</TOOLCALL>'

    app = make_app(script, prompt_format=card_format())
    allowed = [{"type": "function", "function": {"name": "get_time"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
    weather = {"type": "function", "function": {"name": "get_weather"}}
    body = {"messages": HI, "tools": [weather, TIME], "tool_choice": choice, "temperature": 0}
    answer = app.post(ROUTE, {**body, "parallel_tool_calls": False}).json()
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "get_time"
    assert "get_weather" in seen[0]
    assert "get_time" in seen[0]


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
        (
            {"tools": [CODE], "tool_choice": {"type": "function", "function": {"name": "run_code"}}},
            "names 'run_code'",
        ),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "custom", "custom": {"name": "y"}}]},
                },
            },
            "names 'y'",
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed", "x": 1}}, "allowed_tools"),
        ({"tools": [{"type": "web_search"}]}, "'function', 'custom'"),
        ({"tools": [CODE, {"type": "function", "function": {"name": "run_code"}}]}, "both named 'run_code'"),
        (
            {
                "tools": [
                    {
                        "type": "custom",
                        "custom": {
                            "name": "f",
                            "format": {
                                "type": "grammar",
                                "grammar": {"syntax": "lark", "definition": "start: x"},
                            },
                        },
                    }
                ]
            },
            "custom tool 'f': a format of type grammar",
        ),
        (
            {"messages": [*HI, {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}]},
            "a custom tool",
        ),
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
