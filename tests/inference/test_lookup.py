"""Guessed tokens change nothing but the time: no token, no log-probability, no end of an answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemotron4.engine import EngineStats, SamplingParams, SamplingRequest
from nemotron4.inference.lookup import PAUSE, Lookup
from nemotron4.records import Generation
from tests.inference.small_engine import PATHS, EnginePath, random_prompts, small_engine

GREEDY = SamplingParams(max_new_tokens=120, temperature=0, ignore_eos=True, logprobs=0)
DRAWN = replace(GREEDY, temperature=0.5, top_k=3, seed=11)


def test_what_followed_the_last_two_tokens_most_recently_is_guessed() -> None:
    lookup = Lookup(100, most=4)
    assert lookup.propose((1, 2, 3, 1, 2, 4, 5, 6, 1), [2]) == (4,)
    assert lookup.propose((1, 2, 3, 1, 2, 4, 5, 6, 1), [2, 9]) == ()


def test_a_guess_is_as_long_as_the_last_ones_were_right() -> None:
    lookup, prompt = Lookup(100, most=4), tuple(range(20))
    for num_new, length in ((2, 1), (3, 1), (5, 2), (9, 4), (13, 4)):
        guesses = lookup.propose(prompt, list(range(num_new)))
        assert guesses == tuple(range(num_new, num_new + length))
        lookup.learn(length, length, num_new + length)
    lookup.learn(4, 3, 16)
    assert len(lookup.propose(prompt, list(range(17)))) == 1


def test_a_loop_is_guessed_beyond_what_was_seen_of_it() -> None:
    lookup = Lookup(100, most=5)
    lookup.learn(5, 5, 1)
    assert lookup.propose((7,), [8, 9, 8, 9]) == (8, 9, 8, 9, 8)


def test_no_token_behind_the_last_wanted_one_is_guessed() -> None:
    lookup = Lookup(6, most=5)
    lookup.learn(5, 5, 1)
    assert [len(lookup.propose((1, 1, 1), [1] * n)) for n in (1, 2, 3, 4, 5)] == [4, 3, 2, 1, 0]


def test_a_request_whose_guesses_are_wrong_pauses() -> None:
    lookup, new, tried = Lookup(1000, most=7), [1, 1, 1], 0
    for _ in range(400):
        guesses = lookup.propose((1, 1), new)
        new.append(1)
        if guesses:
            tried += 1
            lookup.learn(len(guesses), 0, len(new))
    assert 400 // (PAUSE + 2) <= tried <= 400 // PAUSE * 2 + 8


def answers(
    requests: list[SamplingRequest], path: EnginePath = "float32", *, guesses: int = 7, num_blocks: int = 128
) -> tuple[list[Generation], EngineStats]:
    with small_engine(path=path, num_speculative_tokens=guesses, num_blocks=num_blocks) as engine:
        engine._scheduler.max_guessing = 16  # in use it is one: more would not be faster
        found = engine.generate_each(requests)
        assert engine.generate_each(requests[:1]) == found[:1]  # what is kept of the prompt is right
        return found, engine.stats()


def guesses_of(stats: EngineStats) -> tuple[int, int]:
    return stats.spec_decode_num_draft_tokens_total, stats.spec_decode_num_accepted_tokens_total


def prompts() -> list[tuple[int, ...]]:
    """Two share a beginning of three blocks; all repeat themselves."""
    first, *rest = (tuple(ids * 3) for ids in random_prompts(40, 11, 5))
    return [first, (*first[:100], *rest[0]), *rest]


@pytest.mark.parametrize("path", PATHS)
def test_tokens_logprobs_and_seeds_are_the_same_with_guesses(path: EnginePath) -> None:
    penal = replace(GREEDY, repetition_penalty=1.1, presence_penalty=0.5, logit_bias={40: 2.0})
    scored = replace(DRAWN, prompt_logprobs=1, logprobs=2)
    requests = [
        SamplingRequest(ids, params)
        for ids, params in zip(prompts(), (GREEDY, DRAWN, penal, scored), strict=True)
    ]
    expected, plain = answers(requests, path, guesses=0)
    found, stats = answers(requests, path)
    assert found == expected
    assert guesses_of(plain) == (0, 0)
    num_guessed, num_right = guesses_of(stats)
    assert min(num_right, num_guessed - num_right) > 30, "of both many"
    assert stats.prompt_tokens_reused_total == plain.prompt_tokens_reused_total
    assert stats.generated_tokens_total == plain.generated_tokens_total


@pytest.mark.parametrize("params", [GREEDY, DRAWN])
def test_answers_end_within_a_guess_where_they_end_without(params: SamplingParams) -> None:
    ids = prompts()[0]
    [free], _ = answers([SamplingRequest(ids, params)], guesses=0)
    requests = [SamplingRequest(ids, replace(params, max_new_tokens=n)) for n in range(1, 60, 2)]
    for i in range(3, 120, 4):
        requests.append(SamplingRequest(ids, replace(params, stop_strings=(free.text[i : i + 3],))))
        requests.append(SamplingRequest(ids, replace(params, stop_token_ids=frozenset({free.token_ids[i]}))))
    expected, _ = answers(requests, guesses=0)
    found, stats = answers(requests)
    assert found == expected
    assert {each.finish_reason for each in found} == {"stop", "length"}
    assert guesses_of(stats)[1] > 0


@pytest.mark.parametrize("path", ["torch-float32", "int8"])
def test_requests_that_are_set_back_guess_the_same(path: EnginePath) -> None:
    requests = [
        SamplingRequest(ids, replace(DRAWN, seed=i, max_new_tokens=60)) for i, ids in enumerate(prompts())
    ]
    expected, _ = answers(requests, path, guesses=0)
    found, stats = answers(requests, path, num_blocks=10)
    assert found == expected
    assert stats.preemptions_total > 0
    assert guesses_of(stats)[1] > 0
    assert stats.cache_blocks_used == 0


def test_only_a_request_that_runs_alone_is_guessed() -> None:
    requests = [SamplingRequest(ids, GREEDY) for ids in prompts()[:2]]
    with small_engine(num_speculative_tokens=7) as engine:
        engine.generate_each(requests)
        assert guesses_of(engine.stats()) == (0, 0)
        engine.generate_each(requests[:1])
        assert guesses_of(engine.stats())[1] > 0
