"""The answer of ``PUT /generate``: its form, row lengths, stop rules, sampling, scores."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from nemotron4.errors import EngineBusyError
from nemotron4.inference.fake_tokenizer import EOS, FakeTokenizer
from nemotron4.server.nemo import INLINE_TOKENS
from nemotron4.server.settings import ServerSettings

App = Callable[..., Any]
CARD_END_STRINGS = ["<|endoftext|>", "<extra_id_1>", "\x11", "<extra_id_1>User"]
FIXED = ServerSettings(nemo_compat="fixed")


def _generate(app: Any, sentences: list[str], **fields: Any) -> Any:
    response = app.generate({"sentences": sentences, "greedy": True, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_the_bytes_are_sorted_compact_ascii_with_a_newline(make_app: App) -> None:
    body = {"sentences": ["hé"], "tokens_to_generate": 2, "greedy": True}
    response = make_app("\x07 ").generate(body)
    assert response.content == (
        b'{"logprob":null,"offsets":[[0,1,7,13,19]],"sentences":["h\\u00e9\\u0007 "],'
        b'"token_ids":[[116,207,181,19,44]],"tokens":[["h","<0xC3>","<0xA9>","<0x07>","\\u2581"]]}\n'
    )
    assert response.headers["content-type"] == "application/json"


def test_sentences_hold_prompt_and_completion_with_the_stop_string(make_app: App) -> None:
    prompt = "<extra_id_0>System\n\n<extra_id_1>User\nhi\n<extra_id_1>Assistant\n"
    answer = _generate(make_app("fine\n<extra_id_1>User"), [prompt], end_strings=CARD_END_STRINGS)
    assert answer["sentences"] == [prompt + "fine\n<extra_id_1>"]
    assert answer["sentences"][0][: len(prompt)] == prompt


def test_control_pieces_decode_to_nothing_and_stay_in_tokens(make_app: App) -> None:
    answer = _generate(make_app("yes"), ["ok"], add_BOS=True)
    assert answer["sentences"] == ["okyes"]
    assert answer["tokens"] == [["<s>", "o", "k", "y", "e", "s", "</s>"]]
    assert answer["offsets"] == [[0, 3, 4, 5, 6, 7, 8]]


def test_a_large_answer_has_the_rows_that_a_small_one_has(make_app: App) -> None:
    app = make_app("yes")
    small, large = (
        _generate(app, ["ok"] * count, tokens_to_generate=20) for count in (1, INLINE_TOKENS // 20)
    )
    for name in ("sentences", "tokens", "token_ids", "offsets"):
        assert large[name] == small[name] * len(large[name])


def test_leading_and_trailing_space_survives(make_app: App) -> None:
    answer = _generate(make_app("  b \n"), ["  a "])
    assert answer["sentences"] == ["  a   b \n"]


def test_a_marker_in_the_prompt_is_the_marker(make_app: App) -> None:
    answer = _generate(make_app("b"), ["a<extra_id_1>"], tokens_to_generate=1)
    assert answer["token_ids"] == [[109, 5, 110]]


def test_a_short_prompt_gets_tokens_until_the_long_one_has_its_own(make_app: App) -> None:
    answer = _generate(make_app("0123456789"), ["a", "abcdef"], tokens_to_generate=3)
    assert answer["sentences"] == ["a01234567", "abcdef012"]
    assert [len(ids) for ids in answer["token_ids"]] == [9, 9]


def test_a_row_that_ends_early_is_filled_with_end_of_text(make_app: App) -> None:
    answer = _generate(make_app({"x": "1", "y": "12345"}), ["x", "yy"], tokens_to_generate=3)
    assert answer["sentences"] == ["x1", "yy123"]
    assert answer["token_ids"][0][2:] == [EOS, EOS, EOS]
    assert answer["tokens"][0] == ["x", "1", "</s>", "</s>", "</s>"]


def test_the_batch_ends_when_its_longest_row_does(make_app: App) -> None:
    answer = _generate(make_app({"x": "1", "y": "123"}), ["x", "y"], tokens_to_generate=50)
    assert [len(ids) for ids in answer["token_ids"]] == [5, 5]
    assert answer["sentences"] == ["x1", "y123"]


@pytest.mark.parametrize(
    ("end_strings", "reply", "completion"),
    [
        ([], "one<extra_id_1>two", "one<extra_id_1>two"),
        (["<|endoftext|>"], "one<extra_id_1>two", "one<extra_id_1>two"),
        (CARD_END_STRINGS, "one<extra_id_1>two", "one<extra_id_1>"),
        (CARD_END_STRINGS, "one\x11two", "one\x11"),
        (["<extra_id_1>"], "one<extra_id_1>two", "one<extra_id_1>"),
        (["ab"], "xxabyy", "xxab"),
        (["a"], "xxabyy", "xxa"),
        (["Done"], "Done!", "Done!"),
        (["Do"], "Done!", "Do"),
        (["<|endoftext|>", "b"], "ab", "ab"),
        ([""], "abc", "a"),
        (["", "zz"], "abc", "a"),
        ([" and"], "you and me", "you and"),
    ],
)
def test_end_strings(make_app: App, end_strings: list[str], reply: str, completion: str) -> None:
    # "Done!" is "Do" and the piece "ne!": the string "Done" ends inside a piece and is missed, as in NeMo.
    answer = _generate(make_app(reply), ["p"], end_strings=end_strings)
    assert answer["sentences"] == ["p" + completion]


def test_a_stop_string_may_begin_in_the_prompt(make_app: App) -> None:
    answer = _generate(make_app("bcd"), ["xxa"], end_strings=["ab"])
    assert answer["sentences"] == ["xxab"]


def test_end_of_text_stops_beside_other_end_strings(make_app: App) -> None:
    answer = _generate(make_app("ab"), ["p"], end_strings=["zz"])
    assert answer["tokens"] == [["p", "a", "b", "</s>"]]


def test_min_tokens_masks_only_end_of_text(make_app: App) -> None:
    app = make_app("ab")
    assert len(_generate(app, ["p"], min_tokens_to_generate=6)["token_ids"][0]) >= 1 + 6
    stopped = _generate(app, ["p"], min_tokens_to_generate=6, end_strings=["b"])
    assert stopped["sentences"] == ["pab"]


def test_greedy_ignores_the_sampling_fields(make_app: App) -> None:
    app = make_app(settings=FIXED)
    plain = _generate(app, ["p"], tokens_to_generate=20)
    odd = _generate(
        app, ["p"], tokens_to_generate=20, temperature=50, top_k=3, top_p=0.1, repetition_penalty=3.0
    )
    assert odd == plain


def test_top_k_one_is_greedy(make_app: App) -> None:
    app = make_app()
    expected = _generate(app, ["p"], tokens_to_generate=20)
    assert _generate(app, ["p"], tokens_to_generate=20, greedy=False, top_k=1, top_p=0.0) == expected
    assert _generate(app, ["p"], tokens_to_generate=20, greedy=False, top_k=1.9, top_p=0.0) == expected


def test_top_p_zero_and_one_are_off(make_app: App) -> None:
    app = make_app()
    fields = {"tokens_to_generate": 30, "greedy": False, "random_seed": 5, "temperature": 2.0}
    zero, one, half = (_generate(app, ["p"], top_p=p, **fields) for p in (0.0, 1.0, 0.5))
    assert zero == one
    assert half != one


def test_the_repetition_penalty_is_inert_unless_fixed(make_app: App) -> None:
    fields = {"tokens_to_generate": 40, "greedy": False, "random_seed": 1, "top_p": 1.0}

    def run(settings: ServerSettings, **more: float) -> Any:
        return _generate(make_app(settings=settings), ["p"], **fields, **more)

    strict = ServerSettings()
    assert run(strict, repetition_penalty=50.0) == run(strict)
    assert run(FIXED, repetition_penalty=50.0) != run(FIXED, repetition_penalty=1.0)
    assert run(FIXED) == run(FIXED, repetition_penalty=1.0)


def test_a_seed_makes_the_answer_repeat_whatever_else_runs(make_app: App) -> None:
    app = make_app()
    fields = {"tokens_to_generate": 20, "greedy": False, "random_seed": 7, "temperature": 2.0}
    first = _generate(app, ["p", "p"], **fields)
    _generate(app, ["q"], tokens_to_generate=9, greedy=False)
    assert _generate(app, ["p", "p"], **fields) == first
    assert first["sentences"][0] != first["sentences"][1]
    assert _generate(app, ["p", "p"], **{**fields, "random_seed": 8}) != first
    unseeded = {**fields, "random_seed": None}
    assert _generate(app, ["p"], **unseeded) != _generate(app, ["p"], **unseeded)


def test_a_request_gives_its_tokens_alone_and_among_others(make_app: App) -> None:
    app = make_app()
    fields = {"tokens_to_generate": 10, "min_tokens_to_generate": 10, "greedy": False, "random_seed": 3}
    alone = _generate(app, ["same"], **fields)
    beside = _generate(app, ["same", "else"], **fields)
    assert beside["token_ids"][0] == alone["token_ids"][0]


@pytest.mark.parametrize("compute_logprob", [True, False])
@pytest.mark.parametrize("all_probs", [True, False])
def test_score_flags(make_app: App, compute_logprob: bool, all_probs: bool) -> None:
    answer = _generate(
        make_app(), ["ab", "c"], tokens_to_generate=2, compute_logprob=compute_logprob, all_probs=all_probs
    )
    num_tokens = len(answer["token_ids"][0])
    assert (answer["logprob"] is not None) == compute_logprob
    assert ("full_logprob" in answer) == all_probs
    if compute_logprob:
        assert [len(row) for row in answer["logprob"]] == [num_tokens - 1] * 2
    if all_probs and not compute_logprob:
        assert answer["full_logprob"] is None
    if all_probs and compute_logprob:
        width = FakeTokenizer().vocab_size
        assert [[len(position) for position in row] for row in answer["full_logprob"]] == [
            [width] * (num_tokens - 1)
        ] * 2


def test_logprob_entry_j_belongs_to_token_j_plus_one_and_is_raw(make_app: App) -> None:
    fields = {"tokens_to_generate": 3, "compute_logprob": True, "all_probs": True, "random_seed": 2}
    answer = _generate(make_app(), ["abc"], greedy=False, temperature=3.0, top_k=5, **fields)
    for row, ids, full in zip(answer["logprob"], answer["token_ids"], answer["full_logprob"], strict=True):
        assert row == [position[token_id] for position, token_id in zip(full, ids[1:], strict=True)]
        for position in full:
            assert math.isclose(sum(map(math.exp, position)), 1.0, rel_tol=1e-9)


def test_what_fills_a_row_up_is_certain(make_app: App) -> None:
    app = make_app({"x": "1", "y": "123"})
    answer = _generate(app, ["x", "y"], tokens_to_generate=9, compute_logprob=True, all_probs=True)
    assert answer["logprob"][0][2:] == [0.0, 0.0]
    filling = answer["full_logprob"][0][-1]
    assert filling[EOS] == 0.0
    assert filling.count(-math.inf) == len(filling) - 1


def test_a_prompt_is_scored_with_one_token(make_app: App) -> None:
    app = make_app()
    one = _generate(app, ["score me"], tokens_to_generate=1, compute_logprob=True)["logprob"][0]
    five = _generate(app, ["score me"], tokens_to_generate=5, compute_logprob=True)["logprob"][0]
    assert one[:-1] == five[: len(one) - 1]


def test_all_probs_beyond_the_limit_is_400_with_the_numbers(make_app: App) -> None:
    app = make_app(settings=ServerSettings(max_full_logprob_values=10_000))
    body = {"sentences": ["ab"], "tokens_to_generate": 98, "all_probs": True, "compute_logprob": True}
    response = app.generate(body)
    assert response.status_code == 400
    assert "10000" in response.json()
    assert str(100 * FakeTokenizer().vocab_size) in response.json()


def test_a_busy_engine_is_429_with_retry_after(make_app: App) -> None:
    app = make_app("b", max_running=2, max_waiting=1)
    body = {"sentences": ["a"] * 4, "greedy": True, "tokens_to_generate": 3}
    response = app.generate(body)
    assert (response.status_code, "4 rows; this server has room for 3" in response.json()) == (400, True)
    app.engine.fail_next(EngineBusyError("full", retry_after_s=1.0))
    response = app.generate({**body, "sentences": ["a"]})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert isinstance(response.json(), str)
    assert app.engine.stats().num_running == app.engine.stats().num_waiting == 0
    assert app.generate({**body, "sentences": ["a"] * 3}).status_code == 200


def test_the_card_body_is_answered(make_app: App) -> None:
    prompt = "<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem\n<extra_id_1>Assistant\n"
    body = {
        "sentences": [prompt],
        "tokens_to_generate": 1024,
        "temperature": 1.0,
        "add_BOS": False,
        "top_k": 0,
        "top_p": 1.0,
        "greedy": True,
        "all_probs": False,
        "repetition_penalty": 1.0,
        "min_tokens_to_generate": 1,
        "end_strings": CARD_END_STRINGS,
    }
    response = make_app("Shall I compare thee\n<extra_id_1>").generate(body)
    assert json.loads(response.text)["sentences"] == [prompt + "Shall I compare thee\n<extra_id_1>"]
