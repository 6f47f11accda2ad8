"""Tools: the form of each family, calls read back whole and from a stream, arguments bound by schemas."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron4.errors import RequestError
from nemotron4.inference.fake import FakeEngine
from nemotron4.inference.fake_tokenizer import FakeTokenizer
from nemotron4.records import Message
from nemotron4.text import tools
from nemotron4.text.answers import encode_chat
from nemotron4.text.prompt import nemotron4
from nemotron4.text.structured_output import GrammarVocabulary
from nemotron4.text.tools import FORMATS, CallReader, ToolCall

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
ROME = ToolCall("get_weather", '{"city": "Rome"}')
NOW = ToolCall("get_time", "{}")
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    "llama3": '{"name": "get_weather", "parameters": {"city": "Rome"}}',
    "nemotron": '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Rome"}}]</TOOLCALL>',
    "mistral": '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}}]',
}


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_written_and_read_back(name: str) -> None:
    form = FORMATS[name]
    assert form.write([ROME]) == WRITTEN[name]
    assert tools.read_calls(form.write([ROME]), form) == ("", [ROME])
    assert tools.read_calls(form.write([ROME, NOW]), form) == ("", [ROME, NOW])
    if name != "llama3":
        assert tools.read_calls(f"Let me see. {form.write([ROME])}", form) == ("Let me see.", [ROME])


@pytest.mark.parametrize(
    ("name", "text", "calls"),
    [
        ("llama3", '<|python_tag|>{"name": "get_time", "parameters": {}}', []),
        ("llama3", '{"name": "get_time", "parameters": {}}; {"name": "get_time"}', [NOW, NOW]),
        ("mistral", '[{"name": "get_time", "arguments": {}}]', [NOW]),  # the marker is a token without text
        ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', [NOW]),
        ("nemotron", "<TOOLCALL>[]</TOOLCALL>", []),
    ],
)  # fmt: skip
def test_forms_that_models_write_as_well(name: str, text: str, calls: list[ToolCall]) -> None:
    assert tools.read_calls(text, FORMATS[name])[1] == calls


@pytest.mark.parametrize(
    "text",
    [
        "Plain words.",
        '{"a": 1}',
        "[1, 2]",
        '{"name": 5}',
        '{"name": "x", "arguments": [1]}',
        '<tool_call>\n{"name": "cut',
        "a < b and <tool",
        "<TOOLCALL>oops</TOOLCALL>",
        "",
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_call_stays_text(name: str, text: str) -> None:
    shown, calls = tools.read_calls(text, FORMATS[name])
    assert (shown.strip(), calls) == (text, [])


@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.sampled_from([ROME, NOW]), min_size=1, max_size=3),
    st.integers(1, 7),
    st.booleans(),
)
def test_a_stream_gives_what_the_whole_text_gives(
    name: str, calls: list[ToolCall], step: int, has_text: bool
) -> None:
    form = FORMATS[name]
    text = ("One < two [ok]. " if has_text and name != "llama3" else "") + form.write(calls)
    reader = CallReader(form)
    found: list[ToolCall] = []
    shown = ""
    for at in range(0, len(text), step):
        part, ended = reader.push(text[at : at + step])
        shown += part
        found += ended
    assert (shown + reader.finish(), found) == tools.read_calls(text, form)
    assert found == calls


def test_the_form_is_told_by_the_template_and_by_name() -> None:
    class Own:
        name = "own"

        def __init__(self, template: str) -> None:
            self.template = template
            self.writer = type("Writer", (), {"tools": ()})()

    own: Any = Own
    for template, name in (
        ("{{ tools }}<tool_call>", "hermes"),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ('{{ tools }}{"name": function name, "parameters": dictionary}', "llama3"),
        ("{{ tools }}<TOOLCALL>", "nemotron"),
        ("no such thing", "nemotron"),
    ):
        assert tools.format_of(own(template)).name == name
    assert tools.format_of(nemotron4(), "hermes").name == "hermes"
    with pytest.raises(RequestError, match="unknown tool format 'hermess'"):
        tools.format_of(nemotron4(), "hermess")


def test_a_format_without_tools_gets_them_in_its_system_turn() -> None:
    form = tools.format_of(nemotron4())
    call = {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    talk = [
        Message("system", "Be kind."),
        Message("user", "What time is it?"),
        Message("assistant", "", {"tool_calls": [call]}),
        Message("tool", '{"time": "12:00"}', {"tool_call_id": "1"}),
    ]
    prompt = nemotron4().render(tools.spelled(talk, [TIME], form))
    assert prompt.startswith("<extra_id_0>System\nBe kind.\n\nYou can call functions.")
    assert '<AVAILABLE_TOOLS>[{"name": "get_time"}]</AVAILABLE_TOOLS>' in prompt
    assert 'Assistant\n<TOOLCALL>[{"name": "get_time", "arguments": {}}]</TOOLCALL>\n' in prompt
    assert 'Tool\n<TOOL_RESPONSE>[{"time": "12:00"}]</TOOL_RESPONSE>\n<extra_id_1>Assistant\n' in prompt
    engine = FakeEngine(prompt_format=nemotron4())  # as rows of `generate` come, without tools
    assert encode_chat(engine, talk) == encode_chat(engine, tools.spelled(talk, (), form))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("is_required", [True, False])
def test_the_grammar_binds_names_and_arguments(name: str, is_required: bool) -> None:
    tokenizer, form = FakeTokenizer(), FORMATS[name]
    wanted = tools.grammar(form, [WEATHER, TIME], tokenizer, is_required=is_required)
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.vocab_size)

    def fits(text: str) -> bool:
        follower = vocabulary.follow(wanted)
        for token_id in tokenizer.encode(text):
            if not follower.allowed()[token_id]:
                return False
            follower.consume(token_id)
        return follower.may_end

    assert fits(form.write([ROME]))
    assert fits(form.write([NOW, ROME]))
    assert fits("Just words.") is not is_required
    bad = [
        ToolCall("get_weather", "{}"),
        ToolCall("get_weather", '{"city": "x", "days": 99}'),
        ToolCall("rm", "{}"),
    ]
    for call in bad:
        jsonschema.validate({"city": "x"}, WEATHER["function"]["parameters"])
        assert not fits(form.write([call])), call


def test_arguments_are_an_object_where_the_schema_leaves_it_open() -> None:
    tokenizer, form = FakeTokenizer(), FORMATS["nemotron"]
    schema = {"properties": {"city": {"type": "string"}}, "required": ["city"]}
    for parameters in (schema, {"anyOf": [schema, {"type": "string"}]}):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        wanted = tools.grammar(form, [tool], tokenizer, is_required=True)
        follower = GrammarVocabulary(tokenizer, tokenizer.vocab_size).follow(wanted)
        for token_id in tokenizer.encode('<TOOLCALL>[{"name": "f", "arguments": '):
            follower.consume(token_id)
        allowed = follower.allowed()
        [brace], [quote] = tokenizer.encode("{"), tokenizer.encode('"')
        assert (allowed[brace], allowed[quote]) == (True, False)


def test_one_call_is_one_call() -> None:
    tokenizer = FakeTokenizer()
    form = FORMATS["nemotron"]
    wanted = tools.grammar(form, [TIME], tokenizer, is_required=True, is_parallel=False)
    follower = GrammarVocabulary(tokenizer, tokenizer.vocab_size).follow(wanted)
    text = form.write([NOW])
    for token_id in tokenizer.encode(text):
        assert follower.allowed()[token_id]
        follower.consume(token_id)
    assert follower.is_complete


def test_a_schema_that_cannot_be_followed_is_refused_if_strict() -> None:
    function = {"name": "f", "parameters": {"not": {}}}
    tool = {"type": "function", "function": function}
    form = FORMATS["hermes"]
    assert tools.grammar(form, [tool], FakeTokenizer(), is_required=True).kind == "grammar"
    strict = {"type": "function", "function": {**function, "strict": True}}
    with pytest.raises(RequestError, match=r"tool 'f': .*Unimplemented keys"):
        tools.grammar(form, [strict], FakeTokenizer(), is_required=True)
    assert json.loads(form.write([NOW]).removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
