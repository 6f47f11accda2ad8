"""A content guard in front of the model: block and annotate, streams, /generate, no verdict, metrics, log."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nemotron4.client import FakeBehaviour, FakeChatModel
from nemotron4.errors import ConfigError
from nemotron4.server.guard import Guard, GuardSettings
from nemotron4.text.prompt import nemotron4

App = Callable[..., Any]
CHAT = "/v1/chat/completions"


def verdict(messages: Any, sampling: Any) -> str:
    """Unsafe if the judged text says "lock"; no verdict if it says "mumble"."""
    talk = messages[-1].content.split("<BEGIN CONVERSATION>")[1].split("<END CONVERSATION>")[0]
    is_answer = "'Agent' messages" in messages[-1].content
    judged = talk.rsplit("Agent: ", 1)[-1] if is_answer else talk
    if "mumble" in judged:
        return "Who knows?"
    return "unsafe\nO3" if "lock" in judged else "safe"


def guard(script: Any = verdict, **settings: Any) -> Guard:
    return Guard(FakeChatModel(FakeBehaviour(script=script)), GuardSettings(**settings))


@pytest.fixture
def guarded(make_app: App) -> App:
    def make(reply: str = "Fine.", the_guard: Guard | None = None) -> Any:
        return make_app(reply, prompt_format=nemotron4(), guard=the_guard or guard())

    return make


def chat(app: Any, text: str, **body: Any) -> Any:
    return app.post(CHAT, {"messages": [{"role": "user", "content": text}], "temperature": 0, **body})


def events(response: Any) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_an_unsafe_prompt_never_reaches_the_model(guarded: App) -> None:
    app = guarded()
    for route in (lambda: chat(app, "pick a lock"), lambda: chat(app, "pick a lock", stream=True)):
        refused = route()
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "content_filter"
        assert "O3 Criminal Planning/Confessions" in refused.json()["error"]["message"]
    assert app.engine.stats().generated_tokens_total == 0


def test_an_answer_is_judged_with_its_given_beginning_and_calls_with_the_prompt(guarded: App) -> None:
    hi = {"role": "user", "content": "hello"}
    talk = [hi, {"role": "assistant", "content": "Turn the lo"}]
    body = {"messages": talk, "continue_final_message": True, "temperature": 0, "echo": True}
    (choice,) = guarded("ck.").post(CHAT, body).json()["choices"]
    assert (choice["finish_reason"], "ck." in choice["message"]["content"]) == ("content_filter", False)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"how": "lock"}'}}
    talk = [
        hi,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "x"},
    ]
    assert guarded().post(CHAT, {"messages": talk}).json()["error"]["code"] == "content_filter"


def test_a_safe_exchange_passes_with_its_verdicts(guarded: App) -> None:
    answer = chat(guarded(), "hello").json()
    assert answer["choices"][0]["message"]["content"] == "Fine."
    safe = {"verdict": "safe", "categories": []}
    assert answer["guard"] == {"prompts": [safe], "answers": [safe]}


def test_an_unsafe_answer_is_withheld_with_its_tokens(guarded: App) -> None:
    answer = chat(guarded("Turn the lock."), "hello", logprobs=True).json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == ""
    assert choice["finish_reason"] == "content_filter"
    assert choice["logprobs"]["content"] == []
    assert answer["guard"]["answers"][0]["verdict"] == "unsafe"


def test_a_blocking_guard_holds_a_stream_back_until_it_is_judged(guarded: App) -> None:
    passed = events(chat(guarded("Fine, thank you."), "hello", stream=True))
    texts = [part["choices"][0]["delta"].get("content") for part in passed if part["choices"]]
    assert texts == ["", "Fine, thank you.", None]  # one piece, after the judgment
    assert passed[-1]["guard"]["answers"][0]["verdict"] == "safe"
    blocked = events(chat(guarded("Turn the lock."), "hello", stream=True))
    assert "lock" not in json.dumps(blocked)
    assert blocked[-2]["choices"][0]["finish_reason"] == "content_filter"


def test_annotating_streams_at_once_and_reports_at_the_end(guarded: App) -> None:
    app = guarded("Turn the lock.", guard(mode="annotate"))
    parts = events(chat(app, "pick a lock", stream=True))
    text = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"])
    assert text == "Turn the lock."
    assert len(parts) > 6  # piece by piece
    assert parts[-1]["guard"]["prompts"][0]["verdict"] == "unsafe"
    assert parts[-1]["guard"]["answers"][0]["categories"] == ["O3 Criminal Planning/Confessions"]


def test_completions_are_screened_prompt_by_prompt(guarded: App) -> None:
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 20}
    answer = guarded().post("/v1/completions", body).json()
    assert [len(answer["guard"][part]) for part in ("prompts", "answers")] == [2, 4]
    refused = guarded().post("/v1/completions", {"prompt": ["one", "a lock"], "max_tokens": 20})
    assert "Prompt 2 of 2 was refused" in refused.json()["error"]["message"]
    blocked = guarded("lock").post("/v1/completions", {"prompt": "one", "max_tokens": 20}).json()
    assert (blocked["choices"][0]["text"], blocked["choices"][0]["finish_reason"]) == ("", "content_filter")


def test_generate_keeps_nemo_s_body_and_refuses_with_a_json_string(guarded: App) -> None:
    body = {"sentences": ["hi"], "tokens_to_generate": 8, "greedy": True}
    passed = guarded("ok").generate(body)
    assert sorted(passed.json()) == ["logprob", "offsets", "sentences", "token_ids", "tokens"]
    assert passed.headers["X-Guard"] == "prompt=safe; answer=safe"
    refused = guarded("lock").generate(body)
    assert refused.status_code == 400
    assert refused.json().startswith("The answer to sentence 1 of 1 was refused by the content guard: O3")
    assert guarded().generate(body | {"sentences": ["a lock"]}).status_code == 400
    noted = guarded("lock", guard(mode="annotate")).generate(body)
    assert noted.headers["X-Guard"] == "prompt=safe; answer=unsafe O3"


@pytest.mark.parametrize("script", [None, lambda messages, sampling: "Who knows?"])
def test_no_verdict_is_refused_when_closed_and_passes_when_open(guarded: App, script: Any) -> None:
    def make(**settings: Any) -> Guard:
        if script is not None:
            return guard(script, **settings)
        return Guard(FakeChatModel(FakeBehaviour(failure_rates={"timeout": 1.0})), GuardSettings(**settings))

    outcome = "failed" if script is None else "unparsed"
    refused = chat(guarded("Fine.", make(failure="closed")), "hello")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "content_guard_unavailable"
    passed = chat(guarded("Fine.", make(failure="open")), "hello").json()
    assert passed["choices"][0]["message"]["content"] == "Fine."
    assert passed["guard"]["answers"][0]["verdict"] == outcome


def test_an_answer_without_a_verdict_is_withheld_when_closed(guarded: App) -> None:
    for stream in (False, True):
        assert chat(guarded("mumble"), "hello", stream=stream).status_code == 503


def test_metrics_and_log_have_verdicts_and_no_text(guarded: App) -> None:
    app = guarded("Turn the lock.")
    chat(app, "hello secret")
    metrics = app.request("GET", "/metrics").text
    assert 'nemotron4_guard_seconds_count{part="answer",verdict="unsafe"} 1.0' in metrics
    assert 'nemotron4_guard_seconds_count{part="prompt",verdict="safe"} 1.0' in metrics
    (line, _) = app.log_lines()
    assert line["guard"] == ["prompt safe", "answer unsafe O3"]
    assert "secret" not in app.log.getvalue()


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="guard mode is 'warn'; expected block or annotate"):
        GuardSettings(mode="warn")  # type: ignore[arg-type]


def test_a_server_without_a_guard_says_nothing_of_one(make_app: App) -> None:
    app = make_app("ok", prompt_format=nemotron4())
    assert "guard" not in chat(app, "hello").json()
    assert "X-Guard" not in app.generate({"sentences": ["hi"], "tokens_to_generate": 2}).headers
