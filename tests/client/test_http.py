"""The client against the shipped fake server: replies, errors by class, retries, the adaptive limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nemotron4.client import (
    AdaptiveLimit,
    BadContentError,
    ChatModel,
    ClientError,
    EngineChatModel,
    FakeBehaviour,
    FakeChatModel,
    GenerateChatModel,
    HopelessError,
    OpenAIChatModel,
    Reply,
    RetryPolicy,
    Sampling,
    TransientError,
    call_with_retries,
)
from nemotron4.client.fake_server import FakeServer
from nemotron4.client.http import base_url, error_for_status
from nemotron4.client.retry import ask_missing
from nemotron4.errors import EngineBusyError, RequestError
from nemotron4.inference.fake import FakeEngine
from nemotron4.records import ATTRIBUTES, Message
from nemotron4.runs import IncompleteError, RowLog
from nemotron4.text.prompt import nemotron4, render

Result = TypeVar("Result")
USER = (Message("user", "Write a list of 3 topics."),)
PAIR = (*USER, Message("assistant", "1. tea"))


def with_server(
    behaviour: FakeBehaviour, use: Callable[[FakeServer], Awaitable[Result]], **options: Any
) -> Result:
    async def run() -> Result:
        async with FakeServer(behaviour, **options) as server:
            return await use(server)

    return asyncio.run(run())


def chat_once(behaviour: FakeBehaviour, sampling: Sampling | None = None, **options: Any) -> Reply:
    async def use(server: FakeServer) -> Reply:
        model = OpenAIChatModel(server.url, "fake", **options)
        try:
            return await model.chat(USER, sampling or Sampling())
        finally:
            await model.close()

    return with_server(behaviour, use)


def test_a_chat_reply_carries_text_reason_and_usage() -> None:
    reply = chat_once(FakeBehaviour())
    assert len(reply.text.splitlines()) == 3
    assert (reply.finish_reason, reply.model) == ("stop", "fake")
    assert reply.prompt_tokens == 6
    assert reply.completion_tokens is not None


def test_every_transport_gives_the_fakes_reply_unchanged() -> None:
    async def use(server: FakeServer) -> list[str]:
        models: list[ChatModel] = [
            FakeChatModel(),
            OpenAIChatModel(server.url, "fake"),
            GenerateChatModel(server.root),
        ]
        texts = [(await model.chat(USER, Sampling(max_tokens=50))).text for model in models]
        for model in models:
            await model.close()
        return texts

    texts = with_server(FakeBehaviour(), use)
    assert texts[0] == texts[1]
    written = asyncio.run(FakeChatModel().complete(render(USER), Sampling(max_tokens=50)))
    assert texts[2] == written.text


def test_the_generate_client_removes_prompt_and_stop_and_tells_cut_replies() -> None:
    async def use(server: FakeServer) -> tuple[Reply, Reply]:
        model = GenerateChatModel(server.root)
        whole, cut = await model.chat(USER, Sampling()), await model.chat(USER, Sampling(max_tokens=2))
        await model.close()
        return whole, cut

    whole, cut = with_server(FakeBehaviour(), use)
    assert whole.finish_reason == "stop"
    assert "<extra_id" not in whole.text
    assert (cut.finish_reason, len(cut.text.split())) == ("length", 2)


def test_a_refusal_of_generate_with_status_200_is_hopeless() -> None:
    async def use(server: FakeServer) -> None:
        model = GenerateChatModel(server.root)
        try:
            await model._put({"sentences": ["a"], "tokens_to_generate": 0})
        finally:
            await model.close()

    with pytest.raises(HopelessError, match="must be an integer greater than 0"):
        with_server(FakeBehaviour(), use)


@pytest.mark.parametrize(
    ("kind", "error", "counted_as"),
    [
        ("rate_limit", TransientError, "rate_limit"),
        ("server_error", TransientError, "server_error"),
        ("timeout", TransientError, "timeout"),
        ("connection", TransientError, "connection"),
        ("not_json", BadContentError, "not_json"),
    ],
)
def test_each_failure_has_its_class(kind: str, error: type[ClientError], counted_as: str) -> None:
    with pytest.raises(error) as caught:
        chat_once(FakeBehaviour(failure_rates={kind: 1.0}, retry_after_s=3), timeout_s=0.2)
    assert caught.value.kind == counted_as
    if isinstance(caught.value, TransientError) and kind == "rate_limit":
        assert caught.value.retry_after_s == 3


def test_a_refused_prompt_and_a_wrong_key_are_hopeless() -> None:
    with pytest.raises(HopelessError) as refused:
        chat_once(FakeBehaviour(hopeless="topics"))
    assert (refused.value.kind, refused.value.status) == ("bad_request", 400)

    async def use(server: FakeServer) -> Reply:
        good, bad = (OpenAIChatModel(server.url, "fake", api_key=key) for key in ("right", "wrong"))
        try:
            await good.chat(USER, Sampling())
            return await bad.chat(USER, Sampling())
        finally:
            await good.close()
            await bad.close()

    with pytest.raises(HopelessError, match="401: wrong API key") as caught:
        with_server(FakeBehaviour(), use, api_key="right")
    assert caught.value.kind == "unauthorized"


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/completions"])
def test_the_address_of_a_route_is_that_of_its_server(end: str) -> None:
    assert base_url(f"http://127.0.0.1:8000{end}") == "http://127.0.0.1:8000/v1"


def test_nobody_listening_is_a_connection_error() -> None:
    async def run() -> None:
        async with FakeServer() as server:
            url = server.url
        model = OpenAIChatModel(url, "fake")
        try:
            await model.chat(USER, Sampling())
        finally:
            await model.close()

    with pytest.raises(TransientError) as caught:
        asyncio.run(run())
    assert caught.value.kind == "connection"


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error": {"message": "maximum context length is 4096"}}', "context_length"),
        (400, b'{"error": {"code": "context_length_exceeded"}}', "context_length"),
        (413, b"", "context_length"),
        (404, b'{"error": {"message": "no such model"}}', "not_found"),
        (422, b'[{"msg": "bad"}]', "bad_request"),
        (307, b"", "bad_request"),
        (408, b"", "server_error"),
        (499, b"", "server_error"),
        (529, b"overloaded", "server_error"),
    ],
)
def test_statuses_are_sorted_by_what_a_retry_would_do(status: int, body: bytes, kind: str) -> None:
    assert error_for_status("http://x", status, body, None).kind == kind


def test_retry_after_as_a_date_is_understood() -> None:
    error = error_for_status("http://x", 429, b"", "Wed, 21 Oct 2015 07:28:00 GMT")
    assert isinstance(error, TransientError)
    assert error.retry_after_s == 0.0


@pytest.mark.parametrize("value", ["inf", "1e300", "99999999999999", "Fri, 31 Dec 9999 23:59:59 -2300"])
def test_retry_after_of_any_length_has_a_moment(value: str) -> None:
    error = error_for_status("http://x", 429, b"", value)
    assert isinstance(error, TransientError)
    assert error.retry_after_s is not None
    assert time.localtime(time.time() + error.retry_after_s).tm_year > 2100


def test_logprobs_of_the_reply_and_of_a_continuation() -> None:
    async def use(server: FakeServer) -> tuple[Reply, list[tuple[str, float]]]:
        model = OpenAIChatModel(server.url, "fake")
        reply = await model.chat(USER, Sampling(max_tokens=1, top_logprobs=5))
        found = await model.continuation_logprobs("two and two", [" is four", " is"])
        await model.close()
        return reply, [(token.token, token.logprob) for tokens in found for token in tokens]

    reply, tokens = with_server(FakeBehaviour(), use)
    assert reply.logprobs is not None
    assert reply.logprobs[0].top[0] == (reply.logprobs[0].token, reply.logprobs[0].logprob)
    assert tokens == [(" is", -0.3), (" four", -0.5), (" is", -0.3)]


def test_a_continuation_inside_a_token_is_refused() -> None:
    async def use(server: FakeServer) -> None:
        model = OpenAIChatModel(server.url, "fake")
        try:
            await model.continuation_logprobs("two and tw", ["o"])
        finally:
            await model.close()

    with pytest.raises(BadContentError, match="share a token"):
        with_server(FakeBehaviour(), use)


@pytest.mark.parametrize("form", ["score", "hosted"])
def test_rewards_arrive_in_both_forms(form: Any) -> None:
    async def use(server: FakeServer) -> dict[str, float]:
        model = OpenAIChatModel(server.url, "fake", reward_form=form)
        reward = await model.score(PAIR)
        await model.close()
        return reward.attributes

    values = with_server(FakeBehaviour(), use)
    assert list(values) == list(ATTRIBUTES)
    assert values == asyncio.run(FakeChatModel().score(PAIR)).attributes


def test_the_request_is_what_goes_over_the_wire() -> None:
    model = OpenAIChatModel("http://x/v1", "m", extra_body={"guided": True})
    body = model.chat_request(USER, Sampling(seed=7, stop=("x",)))
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Write a list of 3 topics."}],
        "max_tokens": 1024,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 7,
        "stop": ["x"],
        "guided": True,
    }


def test_impossible_sampling_is_refused_before_any_call() -> None:
    with pytest.raises(RequestError, match="top_p is 0; expected in"):
        Sampling(top_p=0)


def test_retries_end_with_success_or_after_the_last_attempt() -> None:
    calls = 0

    async def flaky() -> str:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise TransientError("later", kind="server_error")
        return "done"

    policy = RetryPolicy(max_attempts=3, first_wait_s=0.001)
    assert asyncio.run(call_with_retries(flaky, policy=policy)) == "done"
    calls = -10
    with pytest.raises(TransientError):
        asyncio.run(call_with_retries(flaky, policy=policy))
    assert calls == -7


def test_a_server_that_dies_after_many_answers_ends_the_run(tmp_path: Path) -> None:
    """Each of what is left fails after a minute of attempts."""
    asked = 0

    async def ask(name: str) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        if asked > 100:
            raise TransientError("refused", kind="connection")
        return {"response": "x"}

    ids = [str(n) for n in range(1000)]
    with RowLog(tmp_path / "rows.jsonl") as log:
        work = ask_missing(log, ids, ask, concurrency=4, on_rows=lambda rows: None, max_failures=None)
        with pytest.raises(IncompleteError, match="20 of 1000 requests have no answer yet: refused"):
            asyncio.run(work)
    assert asked < 130


def test_hopeless_errors_are_not_retried() -> None:
    calls = 0

    async def hopeless() -> None:
        nonlocal calls
        calls += 1
        raise HopelessError("no", kind="bad_request")

    with pytest.raises(HopelessError):
        asyncio.run(call_with_retries(hopeless))
    assert calls == 1


def test_a_wait_is_never_shorter_than_retry_after() -> None:
    error = TransientError("x", kind="rate_limit", retry_after_s=90)
    assert RetryPolicy().wait_s(1, error, 0.0) == 90
    plain = TransientError("x", kind="timeout")
    assert [RetryPolicy().wait_s(attempt, plain, 1.0) for attempt in (1, 2, 9)] == [0.5, 1.0, 60.0]


def test_the_limit_grows_with_success_and_falls_once_per_push_back() -> None:
    limit = AdaptiveLimit(start=4, maximum=100)
    started = limit.started()
    for _ in range(60):
        limit.succeeded()
    assert limit.limit == 64
    for _ in range(3):  # three calls of the same moment are one push-back
        limit.pushed_back(TransientError("x", kind="rate_limit"), started)
    assert limit.limit == 48
    for _ in range(25):
        limit.succeeded()
    assert limit.limit == 49
    for _ in range(3000):
        limit.succeeded()
    assert limit.limit == 100


def test_retry_after_stops_new_calls_until_it_has_passed() -> None:
    limit = AdaptiveLimit()
    limit.pushed_back(TransientError("x", kind="rate_limit", retry_after_s=0.05), time.monotonic())
    assert not limit.has_room
    assert 0 < limit.pause_s <= 0.05


def test_a_broken_connection_does_not_lower_the_limit() -> None:
    limit = AdaptiveLimit(start=8)
    limit.pushed_back(TransientError("x", kind="connection"), time.monotonic())
    assert limit.limit == 8


def test_the_in_process_engine_answers_without_its_stop_text() -> None:
    model = EngineChatModel(FakeEngine("the answer STOP more", prompt_format=nemotron4()))
    reply = asyncio.run(model.chat(USER, Sampling(max_tokens=30, stop=(" STOP",))))
    assert (reply.text, reply.finish_reason) == ("the answer", "stop")
    ended_by_turn = EngineChatModel(FakeEngine("the answer\n<extra_id_1>User", prompt_format=nemotron4()))
    assert asyncio.run(ended_by_turn.chat(USER, Sampling(max_tokens=30))).text == "the answer"


def test_a_base_model_in_process_continues_text_and_refuses_messages() -> None:
    model = EngineChatModel(FakeEngine(" words"))
    assert asyncio.run(model.complete("some", Sampling(max_tokens=30))).text == " words"
    with pytest.raises(HopelessError, match="no chat template"):
        asyncio.run(model.chat(USER, Sampling()))


def test_the_in_process_engine_scores_only_the_continuation() -> None:
    [scores] = asyncio.run(EngineChatModel(FakeEngine()).continuation_logprobs("ab", ["cd"]))
    assert [score.token for score in scores] == ["c", "d"]
    assert all(score.logprob < 0 for score in scores)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (EngineBusyError("full", retry_after_s=2.0), "rate_limit"),
        (RequestError("prompt + max_new_tokens above the context length"), "context_length"),
        (RequestError("empty prompt"), "bad_request"),
    ],
)
def test_engine_errors_are_sorted_like_http_errors(error: Exception, kind: str) -> None:
    engine = FakeEngine("x", prompt_format=nemotron4())
    engine.fail_next(error)
    with pytest.raises(ClientError) as caught:
        asyncio.run(EngineChatModel(engine).chat(USER, Sampling()))
    assert caught.value.kind == kind


def test_the_fake_fails_at_the_asked_rate_and_the_same_way_each_time() -> None:
    behaviour = FakeBehaviour(failure_rates={"rate_limit": 0.1, "empty": 0.2}, seed=5)
    kinds = [behaviour.failure(number) for number in range(2000)]
    assert kinds == [behaviour.failure(number) for number in range(2000)]
    assert 150 < kinds.count("rate_limit") < 250
    assert 330 < kinds.count("empty") < 470
    with pytest.raises(ValueError, match="unknown failure kinds"):
        FakeBehaviour(failure_rates={"typo": 1.0})


def test_the_fake_server_counts_concurrency_and_repeated_requests() -> None:
    async def use(server: FakeServer) -> dict[str, Any]:
        model = OpenAIChatModel(server.url, "fake")
        await asyncio.gather(*(model.chat(USER, Sampling(seed=i % 10)) for i in range(20)))
        await model.close()
        return server.stats()

    stats = with_server(FakeBehaviour(latency_s=0.1), use, count_bodies=True)
    assert stats["calls"] == {"/v1/chat/completions": 20}
    assert stats["max_in_flight"] == 20
    assert (stats["distinct_bodies"], stats["repeated_bodies"]) == (10, 10)
