"""Answers of the world outside: paid although unusable, errors with status 200, thoughts, parts."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from nemotron4.client import (
    BadContentError,
    ClientError,
    HopelessError,
    OpenAIChatModel,
    Reply,
    Sampling,
    TransientError,
)
from nemotron4.client.fake_server import FakeServer
from nemotron4.client.thoughts import split_thoughts
from nemotron4.records import Message

USER = (Message("user", "Hello"),)


def asked(body: bytes, status: int = 200, retry_after_s: float | None = None) -> Reply:
    async def run() -> Reply:
        async with FakeServer(odd=lambda number, request: (status, body, retry_after_s)) as server:
            model = OpenAIChatModel(server.url, "fake")
            try:
                return await model.chat(USER, Sampling())
            finally:
                await model.close()

    return asyncio.run(run())


def said(message: dict[str, Any]) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return orjson.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


def test_a_reply_without_content_is_an_empty_answer() -> None:
    reply = asked(said({"content": None}))
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("", 7, 3)


def test_a_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "thinking", "thinking": "hm"}, {"text": "two"}]
    reply = asked(said({"content": parts}))
    assert (reply.text, reply.thoughts) == ("one two", "hm")
    assert asked(said({"content": ["one ", "two"]})).text == "one two"


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": "12", "completion_tokens": 3.0}, (12, 3)),
        ({"prompt_tokens": -5, "completion_tokens": "many"}, (0, None)),
        ("none", (None, None)),
        ([7], (None, None)),
    ],
)
def test_token_counts_in_other_forms_cost_no_answer(
    usage: object, counts: tuple[int | None, int | None]
) -> None:
    choice = {"message": {"content": "hi"}, "finish_reason": "stop"}
    reply = asked(orjson.dumps({"choices": [choice], "usage": usage}))
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("hi", *counts)


@pytest.mark.parametrize(
    ("more", "choice"),
    [
        ({"error": {"code": 502, "message": "upstream"}}, {"message": {"content": None}}),
        ({}, {"error": {"code": 502, "message": "upstream"}, "message": {"content": "Half an"}}),
        ({}, {"message": {"content": "Half an"}, "finish_reason": "error"}),
        ({}, {"message": {"content": "Half an"}, "finish_reason": "abort"}),
    ],
)
def test_an_answer_that_broke_off_is_asked_for_again(more: dict[str, Any], choice: dict[str, Any]) -> None:
    with pytest.raises(TransientError) as caught:
        asked(orjson.dumps({"choices": [choice], "usage": {"completion_tokens": 9}} | more))
    assert (caught.value.kind, caught.value.paid_tokens) == ("server_error", (0, 9))


def test_thoughts_beside_the_answer_stay_apart() -> None:
    reply = asked(said({"content": "<think>b</think>\n\nyes", "reasoning_content": "a"}))
    assert (reply.text, reply.thoughts) == ("yes", "a\n\nb")


@pytest.mark.parametrize(
    ("text", "answer", "thoughts"),
    [
        ("<think>First I consider cats.", "", "First I consider cats."),
        ("<think>a</think>\n\nhello", "hello", "a"),
        ("a\n</think>\n\nhello", "hello", "a"),
        ("<think>a</think>\n<think>b</think> c", "c", "a\n\nb"),
        ("Sure.\n<thinking>x</thinking>\ny", "Sure.\ny", "x"),
        ("Write `<think>` before it.", "Write `<think>` before it.", None),
    ],
)
def test_thoughts_are_cut_out_closed_or_not(text: str, answer: str, thoughts: str | None) -> None:
    assert split_thoughts(text) == (answer, thoughts)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": 429, "message": "slow down"}, "rate_limit"),
        ({"type": "rate_limit_exceeded", "message": "slow down"}, "rate_limit"),
        ({"message": "the server is overloaded"}, "server_error"),
        ("boom", "server_error"),
    ],
)
def test_an_error_with_status_200_is_as_its_status_and_paid(error: object, kind: str) -> None:
    with pytest.raises(TransientError) as caught:
        asked(orjson.dumps({"error": error, "usage": {"prompt_tokens": 5}}))
    assert (caught.value.kind, caught.value.paid_tokens) == (kind, (5, 0))


def test_a_wrong_key_with_status_200_is_hopeless() -> None:
    with pytest.raises(HopelessError) as caught:
        asked(orjson.dumps({"error": {"code": "invalid_api_key", "message": "no"}}))
    assert caught.value.kind == "unauthorized"


@pytest.mark.parametrize("status", [429, 402])
def test_a_used_up_quota_is_not_a_rate_limit(status: int) -> None:
    with pytest.raises(TransientError) as caught:
        asked(orjson.dumps({"error": {"code": "insufficient_quota", "message": "pay"}}), status)
    assert (caught.value.kind, caught.value.paid_tokens) == ("quota", None)


@pytest.mark.parametrize(
    ("body", "kind", "paid"),
    [
        (b"<html>a proxy</html>", "not_json", (0, 0)),
        (
            b'{"choices": [{"message": {"content": "\\ud800"}}], "usage": {"prompt_tokens": 4}}',
            "broken_text",
            (4, 0),
        ),
        (b'{"choices": []}', "missing_field", (0, 0)),
        (b'{"choices": [{"message": {"content": 5}}]}', "malformed", (0, 0)),
        (b'{"choices": [{"message": "hm"}], "usage": {"completion_tokens": 2}}', "missing_field", (0, 2)),
        (b'{"choices": [{"message": {"content": [3]}}]}', "malformed", (0, 0)),
    ],
)
def test_an_unusable_answer_is_paid(body: bytes, kind: str, paid: tuple[int, int]) -> None:
    with pytest.raises(BadContentError) as caught:
        asked(body)
    assert (caught.value.kind, caught.value.paid_tokens) == (kind, paid)


def test_what_never_came_is_not_paid() -> None:
    with pytest.raises(ClientError) as caught:
        asked(b"{}", 503)
    assert caught.value.paid_tokens is None


@pytest.mark.parametrize(("said", "told"), [("MAX_TOKENS", "length"), ("model_length", "length"), ("x", "x")])
def test_an_answer_that_a_limit_cut_says_so_by_any_word(said: str, told: str) -> None:
    choice = {"message": {"content": "Hello"}, "finish_reason": said}
    assert asked(orjson.dumps({"choices": [choice]})).finish_reason == told


def test_an_answer_that_a_busy_server_broke_off_is_tried_again() -> None:
    choice = {"message": {"content": "Hel"}, "finish_reason": "insufficient_system_resource"}
    with pytest.raises(TransientError):
        asked(orjson.dumps({"choices": [choice]}))
