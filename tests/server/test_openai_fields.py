"""What clients of other servers send: accepted where it is neutral, followed where it means something."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nemotron4.inference.fake import FakeEngine
from nemotron4.inference.fake_tokenizer import EOS, FakeTokenizer
from nemotron4.server.settings import ServerSettings
from nemotron4.text.json_tokenizer import JsonTokenizer, byte_of_character
from nemotron4.text.prompt import from_template, nemotron4
from tests.server.conftest import InProcess

App = Callable[..., Any]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def chat_app(reply: Any = "b", **settings: Any) -> InProcess:
    return InProcess(FakeEngine(reply, prompt_format=nemotron4()), ServerSettings(**settings))


def content(app: InProcess, **body: Any) -> str:
    response = app.post(CHAT, {"messages": HI, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_the_body_of_an_nvidia_client_is_answered() -> None:
    body = {
        "spaces_between_special_tokens": False, "skip_special_tokens": False, "top_k": -1,
        "ignore_eos": False, "stop_token_ids": [7], "add_generation_prompt": True, "best_of": 1, "suffix": "",
    }  # fmt: skip
    messages = [
        {"role": "user", "content": "hi", "id": "m1", "reasoning_content": None},
        {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "user", "content": [{"type": "text", "text": "again"}]},
    ]
    assert content(chat_app(), messages=messages, **body) == "b"
    assert chat_app().post(TEXT, {"prompt": "p", **body}).status_code == 200


def test_null_asks_for_the_default_in_every_field() -> None:
    schema = chat_app().app.openapi()["components"]["schemas"]
    for name, path, needed in (
        ("ChatRequest", CHAT, {"messages": HI}),
        ("CompletionRequest", TEXT, {"prompt": "p"}),
    ):
        nulls = dict.fromkeys(schema[name]["properties"].keys() - needed.keys())
        response = chat_app().post(path, {**nulls, **needed})
        assert response.status_code == 200, response.text


def test_an_unknown_field_is_a_warning_or_refused() -> None:
    response = chat_app().post(CHAT, {"messages": HI, "temperatur": 1, "qwertz": 2})
    assert response.status_code == 200
    assert response.headers["warning"] == (
        "299 - \"unknown field 'temperatur' is ignored; unknown field 'qwertz' is ignored\""
    )
    refusing = chat_app(unknown_fields="refuse").post(CHAT, {"messages": HI, "temperatur": 1})
    error = refusing.json()["error"]
    assert (refusing.status_code, error["param"], error["code"]) == (400, "temperatur", "unknown_parameter")
    assert "did you mean 'temperature'?" in error["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"allowed_token_ids": [5]},
            "allowed_token_ids: not supported by this server; leave it out or send []",
        ),
        ({"bad_words": ["b"]}, "bad_words: not supported"),
        ({"prompt_logprobs": 0}, "here it is echo with logprobs, of /v1/completions, so leave it out"),
        ({"repeat_penalty": 1.1}, "here it is repetition_penalty, so leave it out or send 1 or null"),
        ({"n_predict": 5}, "n_predict: not supported by this server; here it is max_tokens"),
        ({"do_sample": False}, "here it is temperature"),
        ({"regex": "[0-9]"}, "here it is guided_regex"),
        ({"ebnf": "root ::= [0-9]"}, "here it is guided_grammar"),
        ({"nvext": {"guided_jsn": {}}}, "did you mean 'guided_json'?"),
    ],
)
def test_fields_of_other_servers_that_change_an_answer_are_refused(fields: dict[str, Any], said: str) -> None:
    for path, needed in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "p"})):
        response = chat_app().post(path, {**needed, **fields})
        assert (response.status_code, said in response.json()["error"]["message"]) == (400, True)


def test_what_asks_for_nothing_at_other_servers_is_no_warning() -> None:
    neutral = {"bad_words": [], "repeat_penalty": 1.0, "n_predict": -1, "do_sample": True, "mirostat": 0}
    response = chat_app(unknown_fields="refuse").post(CHAT, {"messages": HI, **neutral})
    assert (response.status_code, "warning" in response.headers) == (200, False)


@pytest.mark.parametrize("path", ["/chat/completions", "/models", "/v1/v1/completions"])
def test_an_address_with_another_prefix_than_v1_is_told_the_routes(path: str) -> None:
    answer = chat_app().post(path, {"messages": HI})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_url")
    assert "/v1/chat/completions" in answer.json()["error"]["message"]


def test_a_text_may_be_asked_without_bos() -> None:
    app = InProcess(FakeEngine("b", adds_bos=True), ServerSettings())
    for adds, num_tokens in ((None, 3), (True, 3), (False, 2)):
        answer = app.post(TEXT, {"prompt": "ab", "add_special_tokens": adds})
        assert answer.json()["usage"]["prompt_tokens"] == num_tokens


def test_an_answer_can_be_continued() -> None:
    prompts: list[str] = []
    app = chat_app(lambda prompt: prompts.append(prompt) or " 42")
    messages = [*HI, {"role": "assistant", "content": "The answer is"}]
    assert content(app, messages=messages, continue_final_message=True) == " 42"
    assert prompts[-1].endswith("<extra_id_1>Assistant\nThe answer is")
    assert content(app, messages=messages, continue_final_message=True, echo=True) == "The answer is 42"
    assert content(app, messages=messages) == " 42"
    assert prompts[-1].endswith("The answer is\n<extra_id_1>Assistant\n")
    content(app, messages=messages, add_generation_prompt=False)
    assert prompts[-1].endswith("The answer is\n")
    response = app.post(CHAT, {"messages": HI, "continue_final_message": True})
    assert (response.status_code, "no answer to continue" in response.text) == (400, True)


def test_two_system_messages_and_a_developer_reach_a_format_with_room_for_one() -> None:
    prompts: list[str] = []
    app = chat_app(lambda prompt: prompts.append(prompt) or "b")
    systems = [{"role": "system", "content": "Be kind."}, {"role": "developer", "content": "Be brief."}]
    assert content(app, messages=[*systems, *HI]) == "b"
    assert prompts[-1].startswith("<extra_id_0>System\nBe kind.\n\nBe brief.\n<extra_id_1>User\nhi\n")


def test_what_ends_an_answer_can_be_told() -> None:
    app = chat_app("ab</s>")  # the fake spells it with letters
    stop = FakeTokenizer().encode("b")[0]
    assert content(app, stop_token_ids=[stop]) == "a"
    assert content(app, stop_token_ids=[stop], include_stop_str_in_output=True) == "ab"
    assert content(app, stop="b") == "a"
    assert content(app, stop="b", include_stop_str_in_output=True) == "ab"
    long = chat_app("ab")
    answer = long.post(CHAT, {"messages": HI, "ignore_eos": True, "max_tokens": 9, "temperature": 0}).json()
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (9, "length")
    shown = content(long, ignore_eos=True, skip_special_tokens=False, max_tokens=3)
    assert shown == "ab" + FakeTokenizer().piece(EOS)


def test_limits_can_be_clipped_and_prompts_cut() -> None:
    def small(**settings: Any) -> InProcess:
        engine = FakeEngine("x" * 300, prompt_format=nemotron4(), context_length=100)
        return InProcess(engine, ServerSettings(**settings))

    assert small().post(CHAT, {"messages": HI, "max_tokens": 5000}).status_code == 400
    answer = small(clips_max_tokens=True).post(CHAT, {"messages": HI, "max_tokens": 5000}).json()
    assert answer["usage"]["total_tokens"] == 100
    body = {"prompt": "y" * 500, "truncate_prompt_tokens": 20, "max_tokens": 1}
    assert small().post(TEXT, body).json()["usage"]["prompt_tokens"] == 20


def test_the_model_goes_by_the_names_that_the_operator_gave() -> None:
    app = chat_app(served_names=("nvidia/nemotron-4-340b-instruct", "small"))
    models = app.request("GET", "/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["nvidia/nemotron-4-340b-instruct", "small"]
    for asked, told in ((None, models[0]["id"]), ("small", "small")):
        assert app.post(CHAT, {"messages": HI, "model": asked}).json()["model"] == told
    assert app.request("GET", "/v1/models/nvidia/nemotron-4-340b-instruct").status_code == 200
    assert app.post(CHAT, {"messages": HI, "model": "fake"}).status_code == 404


def test_the_tokenizer_can_be_asked() -> None:
    app, tokenizer = chat_app(), FakeTokenizer()
    found = app.post("/tokenize", {"model": "fake", "prompt": "hello é", "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode("hello é")
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 4096)
    assert app.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": "hello é"}
    chat = app.post("/tokenize", {"messages": HI}).json()["tokens"]
    assert tokenizer.decode(chat).endswith("<extra_id_1>Assistant\n")
    info = app.request("GET", "/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert "add_generation_prompt" in info["chat_template"]
    assert app.post("/tokenize", {"prompt": "a", "messages": HI}).status_code == 400
    assert app.post("/detokenize", {"tokens": [10**6]}).status_code == 400
    assert app.post("/tokenize", {"prompt": "a", "model": "other"}).status_code == 404


def byte_tokenizer() -> JsonTokenizer:
    """A token for each byte, and <|end|>, which is special."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": 256, "content": "<|end|>", "special": True, **flags}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": byte_of_character(), "merges": []},
    }
    return JsonTokenizer(spec, source="toy", bos="<|end|>", eos="<|end|>")


def test_special_tokens_are_in_a_detokenized_text() -> None:
    app = InProcess(FakeEngine("b", tokenizer=byte_tokenizer()), ServerSettings())
    ids = app.post("/tokenize", {"prompt": "<|end|>é<|end|>"}).json()["tokens"]
    assert len(ids) == 4
    assert app.post("/detokenize", {"tokens": ids}).json() == {"prompt": "<|end|>é<|end|>"}


def test_offsets_of_an_echoed_prompt_count_the_special_tokens_in_it() -> None:
    app = InProcess(FakeEngine("b", tokenizer=byte_tokenizer(), adds_bos=True), ServerSettings())
    body = {"echo": True, "logprobs": 0, "max_tokens": 1}
    choice = app.post(TEXT, {**body, "prompt": "a<|end|>b"}).json()["choices"][0]
    assert choice["text"] == "a<|end|>bb"
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 8, 9]  # of the BOS put first, and of the new token
    choice = app.post(TEXT, {**body, "prompt": [97, 256, 98]}).json()["choices"][0]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("abb", [0, 1, 1, 2])


def test_a_stream_that_waits_sends_its_headers_and_comments(
    serving: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemotron4.server import rows

    monkeypatch.setattr(rows, "HEADERS_AFTER_S", 0.01)
    monkeypatch.setattr(rows, "COMMENT_S", 0.05)
    with serving(FakeEngine("ab", max_running=1, delay_s=0.1)) as running:
        body = {"prompt": "p", "stream": True, "temperature": 0}
        with running.client.stream("POST", TEXT, json={**body, "max_tokens": 3}) as first:
            running.wait_until(lambda stats: stats.num_running == 1)
            with running.client.stream("POST", TEXT, json=body) as second:
                assert second.status_code == 200
                assert first.status_code == 200
                lines = [line for line in second.iter_lines() if line]
    assert lines[0] == ": waiting"
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if "{" in line) == "ab"


def test_tokens_found_in_the_cache_are_told(tmp_path: Any) -> None:
    from nemotron4.server.app import create_app
    from tests.inference.small_engine import small_engine

    with small_engine() as engine:
        app = InProcess(engine, ServerSettings())  # type: ignore[arg-type]
        app.app = create_app(engine)
        body = {"prompt": list(range(40, 90)) * 3, "max_tokens": 2, "temperature": 0}
        first, again = (app.post(TEXT, body).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["prompt_tokens_details"]["cached_tokens"] >= 96


def test_pages_of_an_allowed_site_may_use_the_server() -> None:
    site, key = "https://chat.example", {"Authorization": "Bearer k"}
    app = chat_app(allowed_origins=(site,), api_keys=("k",))
    ask = {"Origin": site, "Access-Control-Request-Method": "POST"}
    preflight = app.request("OPTIONS", CHAT, headers=ask)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, site)
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    names = "authorization,content-type,x-stainless-lang"  # as OpenAI's own client asks
    preflight = app.request("OPTIONS", CHAT, headers={**ask, "Access-Control-Request-Headers": names})
    assert preflight.headers["access-control-allow-headers"] == names
    answer = app.post(CHAT, {"messages": HI}, Origin=site, **key)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, site)
    assert app.post(CHAT, {"messages": HI}, Origin=site).status_code == 401
    other = app.post(CHAT, {"messages": HI}, Origin="https://evil.example", **key)
    assert (other.status_code, "access-control-allow-origin" in other.headers) == (403, False)
    assert "access-control-allow-origin" not in chat_app().post(CHAT, {"messages": HI}).headers


def test_variables_of_the_models_template_are_followed_or_named() -> None:
    template = "{{ messages[0].content }}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}|"
    own = from_template(template, FakeTokenizer())
    app = InProcess(FakeEngine(lambda prompt: prompt, prompt_format=own), ServerSettings())
    sent = {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}}
    answer = app.post(CHAT, sent)
    assert answer.json()["choices"][0]["message"]["content"] == "hiFalse|"
    assert "warning" not in answer.headers
    assert app.post("/tokenize", sent).json()["count"] == len("hiFalse|")

    other = {"messages": HI, "chat_template_kwargs": {"thinking": 1}}
    for route in (CHAT, "/tokenize"):
        assert "'thinking' is no variable" in chat_app().post(route, other).headers["warning"]
        refused = chat_app(unknown_fields="refuse").post(route, other)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_tokens_are_counted_with_the_tools_of_the_chat() -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    sent = {"messages": HI, "tools": tools}
    counted = chat_app().post("/tokenize", sent).json()["count"]
    assert counted == chat_app().post(CHAT, sent).json()["usage"]["prompt_tokens"]
    assert counted > chat_app().post("/tokenize", {"messages": HI}).json()["count"] + 100
    answer = chat_app().post("/tokenize", {"messages": HI, "toolz": []})
    assert answer.headers["warning"] == "299 - \"unknown field 'toolz' is ignored\""
