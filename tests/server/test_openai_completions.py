"""``/v1/models`` and ``/v1/completions``: forms of prompts, choices, scores, streams, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nemotron4.errors import EngineBusyError
from nemotron4.inference.fake_tokenizer import FakeTokenizer

App = Callable[..., Any]
ROUTE = "/v1/completions"


UNCACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


def _events(text: str) -> list[Any]:
    """The objects of a stream of server-sent events, which must end with [DONE]."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def _complete(app: Any, **body: Any) -> Any:
    response = app.post(ROUTE, {"temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def _texts(answer: Any) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def test_models_names_the_one_served(make_app: App) -> None:
    app = make_app(name="org/tiny")
    listed = app.request("GET", "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["org/tiny"]
    assert app.request("GET", "/v1/models/org/tiny").json() == listed["data"][0]
    missing = app.request("GET", "/v1/models/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a", ["A"]),
        (["a", "b"], ["A", "B"]),
        (FakeTokenizer().encode("a"), ["A"]),
        ([FakeTokenizer().encode("a"), FakeTokenizer().encode("b")], ["A", "B"]),
    ],
)
def test_every_form_of_prompt(make_app: App, prompt: Any, texts: list[str]) -> None:
    answer = _complete(make_app({"a": "A", "b": "B"}), prompt=prompt)
    assert _texts(answer) == texts
    assert answer["object"] == "text_completion"
    assert answer["model"] == "fake"


def test_text_of_a_model_that_expects_bos_gets_it_and_raw_generate_does_not(make_app: App) -> None:
    app = make_app("b", adds_bos=True)
    assert _complete(app, prompt="aa")["usage"]["prompt_tokens"] == 3
    assert _complete(app, prompt=FakeTokenizer().encode("aa"))["usage"]["prompt_tokens"] == 2
    assert _texts(_complete(app, prompt="", echo=True)) == ["b"]
    assert app.generate({"sentences": ["a"], "greedy": True}).json()["tokens"] == [["a", "b", "</s>"]]


def test_16_tokens_by_default_and_the_reason_is_length(make_app: App) -> None:
    answer = _complete(make_app("x" * 50), prompt="p")
    assert answer["choices"][0] == {"index": 0, "text": "x" * 16, "logprobs": None, "finish_reason": "length"}
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 16, "total_tokens": 17, **UNCACHED}


def test_an_answer_that_ends_by_itself_has_the_reason_stop(make_app: App) -> None:
    answer = _complete(make_app("ab"), prompt="ppp")
    assert (_texts(answer), answer["choices"][0]["finish_reason"]) == (["ab"], "stop")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6, **UNCACHED}


def test_n_gives_choices_prompt_by_prompt_and_counts_prompts_once(make_app: App) -> None:
    answer = _complete(make_app({"a": "A", "b": "B"}), prompt=["aa", "b"], n=2)
    assert _texts(answer) == ["A", "A", "B", "B"]
    assert answer["usage"]["prompt_tokens"] == 3
    sampled = _texts(_complete(make_app(), prompt="p", n=3, seed=1, temperature=1))
    assert len(set(sampled)) == 3
    assert sampled[0] == _texts(_complete(make_app(), prompt="p", seed=1, temperature=1))[0]


def test_a_seed_repeats_also_a_negative_one(make_app: App) -> None:
    for seed in (5, -5, -(2**63)):
        one, two = (
            _texts(_complete(make_app(), prompt="p", n=2, seed=seed, temperature=2)) for _ in range(2)
        )
        assert one == two


@pytest.mark.parametrize("stop", ["ll", ["zz", "ll"]])
def test_stop_strings_end_the_text_and_are_not_in_it(make_app: App, stop: Any) -> None:
    answer = _complete(make_app("hello there"), prompt="p", stop=stop)
    assert (_texts(answer), answer["choices"][0]["finish_reason"]) == (["he"], "stop")


def test_echo_puts_the_prompt_first(make_app: App) -> None:
    assert _texts(_complete(make_app("b"), prompt="<s> a", echo=True)) == ["<s> ab"]
    silent = _complete(make_app("b"), prompt="a", echo=True, max_tokens=0)
    assert (_texts(silent), silent["choices"][0]["finish_reason"]) == (["a"], "length")


def test_logprobs_line_up_with_the_text(make_app: App) -> None:
    choice = _complete(make_app("hé the"), prompt="p", logprobs=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", " the"]
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert all(value <= 0 for value in logprobs["token_logprobs"])
    assert [max(top.values()) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2, 2]


def test_logprobs_zero_gives_chosen_tokens_only(make_app: App) -> None:
    logprobs = _complete(make_app("ab"), prompt="p", logprobs=0)["choices"][0]["logprobs"]
    assert (logprobs["tokens"], logprobs["top_logprobs"]) == (["a", "b"], None)


def test_echo_with_logprobs_scores_the_prompt(make_app: App) -> None:
    choice = _complete(make_app("z"), prompt="héy", logprobs=1, echo=True, max_tokens=1)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["h", "bytes:\\xc3", "bytes:\\xa9", "y", "z"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    assert choice["text"] == "héyz"


def test_logprobs_leave_out_the_tokens_of_a_stop_string(make_app: App) -> None:
    choice = _complete(make_app("ab||c"), prompt="p", logprobs=0, stop="||")["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("ab", ["a", "b"])


@pytest.mark.parametrize("echo", [True, False])
def test_a_stream_says_the_same(make_app: App, echo: bool) -> None:
    body = {
        "prompt": ["é1", "b"],
        "n": 2,
        "echo": echo,
        "logprobs": 1,
        "temperature": 0,
        "stop": "€",
        "stream_options": {"include_usage": True},
    }
    app = make_app({"1": "one é and€x", "b": "two"})
    whole = _complete(app, **{**body, "stream_options": None})
    *chunks, last = _events(app.post(ROUTE, {**body, "stream": True}).text)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts][-1] == choice["finish_reason"]
        assert {part["finish_reason"] for part in parts[:-1]} <= {None}
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for part in parts for x in part["logprobs"][column]] == choice["logprobs"][column]
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_stream_without_options_has_no_usage(make_app: App) -> None:
    response = make_app("ab").post(ROUTE, {"prompt": "p", "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert all("usage" not in event for event in _events(response.text))


def test_sampling_fields_reach_the_engine(make_app: App) -> None:
    app = make_app()
    greedy = _texts(_complete(app, prompt="p"))
    for narrow in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}, {"temperature": 1e-9}):
        assert _texts(_complete(app, prompt="p", **{"temperature": 1, "seed": 2, **narrow})) == greedy
    biased = _complete(app, prompt="p", logit_bias={str(FakeTokenizer().encode("Z")[0]): 100})
    assert _texts(biased) == ["Z" * 16]
    penalised = _complete(app, prompt="p", logit_bias={"102": 12}, frequency_penalty=2, presence_penalty=2)
    assert _texts(penalised) != _texts(_complete(app, prompt="p", logit_bias={"102": 12}))
    least = _complete(make_app("a"), prompt="p", min_tokens=5)
    assert least["usage"]["completion_tokens"] >= 5


REFUSED: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "prompt", "required"),
    ({"prompt": 1}, "prompt", "valid string"),
    ({"prompt": ["a", 1]}, "prompt", "valid"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ""}, "prompt", "at least one token"),
    ({"prompt": ["a", ""]}, "prompt", "at least one token"),
    ({"prompt": [[]]}, "prompt", "at least one token"),
    ({"prompt": [10**6]}, "prompt", "1000000, which is outside the vocabulary"),
    ({"prompt": [-1]}, "prompt", "greater than or equal to 0"),
    ({"prompt": "\ud800"}, None, "surrogate"),
    ({"prompt": "a", "best_of": 2}, "best_of", "not supported"),
    ({"prompt": "a", "suffix": "z"}, "suffix", "not supported"),
    ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
    ({"prompt": "a", "n": 1000}, "n", "less than or equal to 128"),
    ({"prompt": ["a"] * 100, "n": 100}, "n", "1024"),
    ({"prompt": "a", "temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"prompt": "a", "temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"prompt": "a", "temperature": "1"}, "temperature", "valid number"),
    ({"prompt": "a", "temperature": True}, "temperature", "valid number"),
    ({"prompt": "a", "top_p": 1.5}, "top_p", "less than or equal to 1"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", "valid integer"),
    ({"prompt": "a", "logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"prompt": "a", "stop": ""}, "stop", "empty"),
    ({"prompt": "a", "stop": [1]}, "stop", "valid string"),
    ({"prompt": "a", "stream": "yes"}, "stream", "valid boolean"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    ({"prompt": "a", "stream": True, "stream_options": {"usage": 1}}, "usage", "include_usage"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
    ({"prompt": "a", "logit_bias": {"99999": 1}}, "logit_bias", "not a token id"),
    ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", "less than or equal to 100"),
]


@pytest.mark.parametrize(("body", "param", "text"), REFUSED)
def test_a_refusal_names_the_field(make_app: App, body: dict[str, Any], param: str | None, text: str) -> None:
    response = make_app().post(ROUTE, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert text in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_json_object_is_400(make_app: App, body: bytes) -> None:
    response = make_app().request("POST", ROUTE, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_harmless_fields_are_ignored(make_app: App) -> None:
    answer = _complete(make_app("ab"), prompt="p", user="u", metadata={"a": "b"}, store=True, best_of=1)
    assert _texts(answer) == ["ab"]


def test_null_means_left_out(make_app: App) -> None:
    names = (
        "max_tokens",
        "n",
        "seed",
        "stop",
        "stream",
        "top_p",
        "logit_bias",
        "logprobs",
        "suffix",
        "best_of",
    )
    assert _texts(_complete(make_app("ab"), prompt="p", **dict.fromkeys(names))) == ["ab"]


def test_another_model_is_404(make_app: App) -> None:
    response = make_app().post(ROUTE, {"prompt": "a", "model": "gpt"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "'fake'" in response.json()["error"]["message"]


def test_context_overflow_is_400_with_the_numbers(make_app: App) -> None:
    response = make_app(context_length=50).post(ROUTE, {"prompt": "a" * 40, "max_tokens": 11})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert all(number in error["message"] for number in ("50", "40", "11", "51"))


def test_a_busy_engine_is_429_streamed_or_not(make_app: App) -> None:
    app = make_app("b", max_running=1, max_waiting=1)
    for stream in (True, False):
        too_many = app.post(ROUTE, {"prompt": ["a"] * 3, "stream": stream})
        assert (too_many.status_code, too_many.json()["error"]["code"]) == (400, "too_many_rows")
        app.engine.fail_next(EngineBusyError("full", retry_after_s=1.0))
        response = app.post(ROUTE, {"prompt": "a", "stream": stream})
        assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(response.headers["retry-after"]) >= 1
    assert _complete(app, prompt="a")


def test_a_failure_in_mid_stream_is_an_error_event_without_done(make_app: App) -> None:
    app = make_app("abcdef")
    app.engine.fail_next(ValueError("a secret"), after_tokens=3)
    response = app.post(ROUTE, {"prompt": "p", "stream": True, "temperature": 0})
    *_, last = [line for line in response.text.split("\n\n") if line]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert "secret" not in response.text + app.log.getvalue()
    assert app.engine.stats().num_running == 0
    assert _texts(_complete(app, prompt="p")) == ["abcdef"]


def test_a_cut_prompt_is_echoed_as_it_was_read(make_app: App) -> None:
    cut = {"prompt": "abcdef", "truncate_prompt_tokens": 2, "echo": True, "logprobs": 0, "max_tokens": 1}
    [choice] = _complete(make_app("ok"), **cut)["choices"]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("efo", [0, 1, 2])
