"""The checks of ``PUT /generate``: every field, its bounds, its exact text, and which check comes first."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from nemotron4.server.settings import ServerSettings

App = Callable[..., Any]

TASK_IDS = (
    "Input at 'sentences' must by a tuple of two tensors like:                    "
    "(context_tokens_tensor, context_length_tensor) if task ids are given"
)
TOKENS = "tokens_to_generate must be an integer greater than 0"
ALL_PROBS = "all_probs must be a boolean value"
TEMPERATURE = "temperature must be a positive number less than or equal to 100.0"
ADD_BOS = "add_BOS must be a boolean value"
GREEDY = "greedy must be a boolean value"
TOP_K = "top_k must be a positive integer number"
TOP_P = "top_p must be a positive number less than or equal to 1.0"
PENALTY = "repetition_penalty must be a positive number no less than 1.0"
END_STRINGS = "expect end_strings to be a list of strings"
MIN_TOKENS = "min_tokens_to_generate must be an integer no less than 0"
NEIGHBORS = "num of neighbors must be an integer no less than 0"
LOGPROB = "compute_logprob must be a boolean value"
SEED = "random_seed must be a positive integer number or None"

# In NeMo's order: field, its text, values that are refused, values that pass.
FIELDS: list[tuple[str, str, list[Any], list[Any]]] = [
    ("task_ids", TASK_IDS, [None, [], [1], "x"], []),
    ("tokens_to_generate", TOKENS, [None, 0, -1, 1.0, "5", [], False], [1, 3, True]),
    ("all_probs", ALL_PROBS, [None, 0, 1, "true"], [True, False]),
    ("temperature", TEMPERATURE, [None, 0, 0.0, -1, 100.1, 101, True, "1", []], [0.5, 1, 100, 100.0, 1e-300]),
    ("add_BOS", ADD_BOS, [None, 0, 1, "no"], [True, False]),
    ("greedy", GREEDY, [None, 0, 1, "yes"], [True, False]),
    ("top_k", TOP_K, [None, -1, -0.5, True, "3", []], [0, 1, 2.0, 2.7, 10**6]),
    ("top_p", TOP_P, [None, -0.1, 1.1, 2, True, "1", []], [0, 0.0, 0.5, 1, 1.0]),
    ("repetition_penalty", PENALTY, [None, 0.9, 0, -1, True, "1", []], [1, 1.0, 1.2, 5]),
    (
        "end_strings",
        END_STRINGS,
        [None, "x", [1], ["a", None], {"a": 1}, 5],
        [[], ["a"], [""], ["<|endoftext|>"]],
    ),
    ("min_tokens_to_generate", MIN_TOKENS, [None, -1, 1.0, "1", []], [0, 1, True, 10**9]),
    ("neighbors", NEIGHBORS, [None, -1, 1.0, "1", []], [0, 2, True]),
    ("compute_logprob", LOGPROB, [None, 0, 1, "x"], [True, False]),
    ("random_seed", SEED, [-1, 1.0, "1", []], [None, 0, 1, 2**24 + 1, 2**40, 10**30, True]),
]


@pytest.fixture(scope="module")
def apps(make_app: App) -> tuple[Any, Any]:
    """A strict and a fixed app, shared: a refused request leaves nothing behind."""
    return make_app("b"), make_app("b", settings=ServerSettings(nemo_compat="fixed"))


REFUSED = [(name, text, value) for name, text, bad, _ in FIELDS for value in bad]
ACCEPTED = [(name, value) for name, _, _, good in FIELDS for value in good]


@pytest.mark.parametrize(("name", "text", "value"), REFUSED)
def test_a_refusal_is_the_exact_text_with_status_200_or_400_when_fixed(
    apps: tuple[Any, Any], name: str, text: str, value: object
) -> None:
    for app, status in zip(apps, (200, 400), strict=True):
        response = app.generate({"sentences": ["a"], name: value})
        assert response.status_code == status
        assert response.content == json.dumps(text).encode() + b"\n"
        assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_a_value_within_bounds_passes(apps: tuple[Any, Any], name: str, value: object) -> None:
    for app in apps:
        answer = app.generate({"sentences": ["a"], "tokens_to_generate": 2, name: value})
        assert answer.status_code == 200
        assert isinstance(answer.json(), dict)


@pytest.mark.parametrize("number", range(len(FIELDS) - 1))
def test_the_first_failed_check_wins(make_app: App, number: int) -> None:
    body = {name: bad[0] for name, _, bad, _ in FIELDS[number:]}
    response = make_app().generate({"sentences": ["a"], **dict(reversed(body.items()))})
    assert response.json() == FIELDS[number][1]


def test_more_than_128_sentences_is_400_before_every_other_check(make_app: App) -> None:
    response = make_app().generate({"sentences": ["a"] * 129, "temperature": -1, "task_ids": []})
    assert (response.status_code, response.json()) == (400, "Maximum number of sentences is 128")


def test_128_sentences_are_served(make_app: App) -> None:
    answer = make_app("b").generate({"sentences": ["a"] * 128, "tokens_to_generate": 1, "greedy": True})
    assert answer.json()["sentences"] == ["ab"] * 128


@pytest.mark.parametrize(
    "sentences",
    [None, 1, 1.5, True, "abc", "", [], [""], [1], [["a"]], [None], {"a": 1}, {}, ["a", ""], ["a", 1]],
)
def test_odd_sentences_are_400_with_a_string_where_nemo_breaks(make_app: App, sentences: object) -> None:
    response = make_app().generate({"sentences": sentences})
    assert response.status_code == 400
    assert response.json().startswith("sentences ")


def test_missing_sentences_are_400_before_every_other_check(make_app: App) -> None:
    response = make_app().generate({"temperature": -1})
    assert response.status_code == 400
    assert response.json() == "sentences is required: a list of strings"


def test_what_is_in_sentences_is_looked_at_after_every_other_check(make_app: App) -> None:
    response = make_app().generate({"sentences": [1], "temperature": -1})
    assert (response.status_code, response.json()) == (200, TEMPERATURE)


def test_an_empty_sentence_is_served_with_a_beginning_of_text_token(make_app: App) -> None:
    body = {"sentences": [""], "add_BOS": True, "tokens_to_generate": 1, "greedy": True}
    answer = make_app("b").generate(body).json()
    assert (answer["sentences"], answer["tokens"]) == (["b"], [["<s>", "b"]])


@pytest.mark.parametrize(
    "body", [{"sentences": ["\ud800"]}, {"sentences": ["a"], "end_strings": ["\udfff", "x"]}]
)
def test_half_a_surrogate_pair_is_400(make_app: App, body: object) -> None:
    response = make_app().generate(body)
    assert response.status_code == 400
    assert "surrogate" in response.json()


@pytest.mark.parametrize("name", ["top_k", "repetition_penalty"])
def test_infinity_is_400(make_app: App, name: str) -> None:
    response = make_app().generate({"sentences": ["a"], name: float("inf")})
    assert (response.status_code, response.json()) == (400, f"{name} must be a finite number")


def test_too_many_tokens_for_the_context_is_400_with_the_numbers(make_app: App) -> None:
    response = make_app(context_length=100).generate({"sentences": ["abc", "a"], "tokens_to_generate": 98})
    assert response.status_code == 400
    text = response.json()
    assert all(number in text for number in ("100", "3 prompt tokens", "98", "101"))


def test_an_integer_of_thousands_of_digits_is_400(make_app: App) -> None:
    body = '{"sentences":["a"],"tokens_to_generate":' + "9" * 4300 + "}"
    app = make_app()
    headers = {"Content-Type": "application/json"}
    assert app.request("PUT", "/generate", content=body, headers=headers).status_code == 400
    longer = body.replace("9}", "99}")
    assert app.request("PUT", "/generate", content=longer, headers=headers).status_code == 400
