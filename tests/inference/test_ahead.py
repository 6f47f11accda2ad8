"""A stream that runs alone goes ahead of Python: no token, no log-probability, no end changes by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from nemotron4.engine import SamplingParams, SamplingRequest
from nemotron4.inference.engine import Engine
from nemotron4.records import Generation
from tests.inference.small_engine import PATHS, EnginePath, random_prompts, small_engine

GREEDY = SamplingParams(max_new_tokens=75, temperature=0, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=0.8, top_p=0.9, seed=3)
SETTINGS = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "scored": replace(DRAWN, logprobs=2, prompt_logprobs=1),
    "stop tokens": replace(DRAWN, stop_token_ids=frozenset(range(40, 44)), ignore_eos=False),
    "stop strings": replace(GREEDY, stop_strings=("A", "e", "Z9"), min_new_tokens=10),
    "minimum": replace(DRAWN, min_new_tokens=6, min_tokens_masks=frozenset(range(32, 60))),
    "penalties": replace(DRAWN, repetition_penalty=1.2),
    "bias": replace(GREEDY, logit_bias={50: 1.5}),
    "one": replace(GREEDY, max_new_tokens=1),
}


def asked(params: SamplingParams) -> list[SamplingRequest]:
    return [SamplingRequest(tuple(ids), params) for ids in random_prompts(5, 31, 32, 70)]


def answers(
    params: SamplingParams, path: EnginePath, most: int, *, guesses: int = 0, num_blocks: int = 64
) -> tuple[list[Generation], list[int]]:
    """One after the other, and the tokens of each step in which one went ahead."""
    with small_engine(path=path, num_speculative_tokens=guesses, num_blocks=num_blocks) as engine:
        lengths = went_ahead(engine, most)
        return [engine.generate_each([request])[0] for request in asked(params)], lengths


def went_ahead(engine: Engine, most: int) -> list[int]:
    runner: Any = engine._runner
    runner.most_ahead, run, lengths = most, runner.run, []

    def watched(slices: Sequence[Any], ahead: Any = None) -> Any:
        result = run(slices, ahead)
        lengths.extend([len(result.drawn)] if ahead is not None else [])
        return result

    runner.run = watched
    return lengths


@pytest.mark.parametrize("path", [path for path in PATHS if not path.startswith("torch")])
@pytest.mark.parametrize("name", SETTINGS)
def test_going_ahead_changes_nothing(path: EnginePath, name: str) -> None:
    expected, none = answers(SETTINGS[name], path, 0)
    found, lengths = answers(SETTINGS[name], path, 8)
    assert found == expected
    assert not none
    assert bool(lengths) == (name not in ("penalties", "bias", "one"))
    assert all(1 <= length <= 8 for length in lengths)


def test_guesses_are_tried_first_and_both_give_the_same_tokens() -> None:
    expected, _ = answers(GREEDY, "float32", 0)
    found, lengths = answers(GREEDY, "float32", 8, guesses=5)
    assert found == expected
    assert lengths


def test_a_sequence_goes_only_as_far_as_there_are_blocks() -> None:
    expected, _ = answers(GREEDY, "float32", 0, num_blocks=5)
    found, lengths = answers(GREEDY, "float32", 8, num_blocks=5)  # 160 positions for 145
    assert found == expected
    assert lengths


def test_nobody_goes_ahead_while_others_run_or_wait() -> None:
    with small_engine(max_running=1) as engine:
        lengths = went_ahead(engine, 8)
        together = engine.generate_each(asked(GREEDY))
    assert sum(lengths) <= GREEDY.max_new_tokens  # the last of the queue alone
    with small_engine() as engine:
        lengths = went_ahead(engine, 8)
        assert engine.generate_each(asked(GREEDY)) == together
    assert not lengths
