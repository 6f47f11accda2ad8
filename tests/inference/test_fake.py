"""The fake engine keeps the promises of the interface, since other tests rely on it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron4.engine import InferenceEngine, SamplingParams, TokenStep
from nemotron4.errors import EngineBusyError, RequestError
from nemotron4.inference.fake import FakeEngine
from nemotron4.inference.fake_tokenizer import EOS, FakeTokenizer

TOKENIZER = FakeTokenizer()
END = frozenset({EOS})


def _run(engine: FakeEngine, prompt: str = "prompt", **params: Any) -> list[TokenStep]:
    async def collect() -> list[TokenStep]:
        stream = engine.stream(TOKENIZER.encode(prompt), SamplingParams(**params))
        return [step async for step in stream]

    return asyncio.run(collect())


def _ids(steps: list[TokenStep]) -> list[int]:
    return [step.token_id for step in steps if step.token_id is not None]


def _text(steps: list[TokenStep]) -> str:
    return TOKENIZER.decode(_ids(steps))


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_every_text_survives_encoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode(TOKENIZER.encode(text, parse_special=False)) == text


def test_markers_are_parsed_only_on_request() -> None:
    assert TOKENIZER.encode("<extra_id_1>") == [5]
    assert 5 not in TOKENIZER.encode("<extra_id_1>", parse_special=False)


def test_it_is_an_inference_engine() -> None:
    engine: InferenceEngine = FakeEngine()
    assert engine.info.vocab_size == TOKENIZER.vocab_size


def test_a_script_is_said_and_then_ends() -> None:
    steps = _run(FakeEngine("fine, thanks"), temperature=0, stop_token_ids=END)
    assert _text(steps) == "fine, thanks"
    assert (steps[-1].finish_reason, steps[-1].stop_reason) == ("stop", EOS)
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)


def test_the_reply_may_depend_on_the_prompt() -> None:
    said = {"temperature": 0, "stop_token_ids": END}
    assert _text(_run(FakeEngine({"sum": "4", "": "what?"}), "a sum", **said)) == "4"
    assert _text(_run(FakeEngine({"sum": "4", "": "what?"}), "else", **said)) == "what?"
    assert _text(_run(FakeEngine.echo(), "say it", **said)) == "say it"


def test_the_walk_depends_on_seed_and_prompt_only() -> None:
    one = _ids(_run(FakeEngine(), seed=1, max_new_tokens=20))
    assert _ids(_run(FakeEngine(), seed=1, max_new_tokens=20)) == one
    assert _ids(_run(FakeEngine(), seed=2, max_new_tokens=20)) != one
    assert _ids(_run(FakeEngine(), "other", seed=1, max_new_tokens=20)) != one


@pytest.mark.parametrize(
    ("scope", "stop", "expected"),
    [
        ("new_text", "Done", "Done!"),
        ("row_suffix", "Done", "Done!?"),
        ("new_text", "tD", "Done!?"),
        ("row_suffix", "tD", "D"),
        ("row_suffix", "", "D"),
    ],
)
def test_stop_scopes(scope: Any, stop: str, expected: str) -> None:
    steps = _run(
        FakeEngine("Done!?"), temperature=0, stop_strings=(stop,), stop_scope=scope, stop_token_ids=END
    )
    assert _text(steps) == expected


def test_minimum_tokens_hold_back_the_given_ids_and_stop_strings() -> None:
    masked = {"min_new_tokens": 5, "min_tokens_masks": END, "stop_token_ids": END, "temperature": 0}
    assert EOS not in _ids(_run(FakeEngine("ab"), **masked))[:5]
    assert _text(_run(FakeEngine("abcdebf"), stop_strings=("b",), **masked)) == "abcdeb"
    nemo = _run(FakeEngine("abcdebf"), stop_strings=("b",), stop_scope="row_suffix", **masked)
    assert _text(nemo) == "ab"


def test_the_narrowest_filters_are_greedy() -> None:
    greedy = _ids(_run(FakeEngine(), temperature=0, max_new_tokens=15))
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-300}):
        assert _ids(_run(FakeEngine(), seed=3, max_new_tokens=15, **narrow)) == greedy


def test_logit_bias_and_penalties_move_the_choice() -> None:
    wanted = TOKENIZER.encode("Z")[0]
    params = {"temperature": 0, "max_new_tokens": 20}
    assert _ids(_run(FakeEngine(), logit_bias={wanted: 100}, **params)) == [wanted] * 20
    repeating = _ids(_run(FakeEngine(), logit_bias={wanted: 12}, **params))
    for penalty in ({"frequency_penalty": 2.0}, {"repetition_penalty": 5.0}):
        penalised = _ids(_run(FakeEngine(), logit_bias={wanted: 12}, **params, **penalty))
        assert penalised.count(wanted) < repeating.count(wanted)


def test_log_probabilities_are_those_of_the_raw_model() -> None:
    asked = {"logprobs": 2, "prompt_logprobs": 0, "full_logprobs": True, "max_new_tokens": 3, "seed": 1}
    raw, cold = _run(FakeEngine(), **asked)[0], _run(FakeEngine(), temperature=0.01, **asked)[0]
    assert raw.prompt_logprobs == cold.prompt_logprobs
    assert len(raw.prompt_logprobs or ()) == len("prompt") - 1
    assert raw.logprobs is not None
    assert cold.logprobs is not None
    assert raw.logprobs.top == cold.logprobs.top
    assert raw.logprobs.top[0].logprob == max(raw.logprobs.full or ())


def test_no_new_tokens_gives_only_the_reason() -> None:
    steps = _run(FakeEngine(), max_new_tokens=0, prompt_logprobs=0)
    assert [(step.token_id, step.finish_reason) for step in steps] == [(None, "length")]
    assert len(steps[0].prompt_logprobs or ()) == len("prompt") - 1


@pytest.mark.parametrize("params", [{"max_new_tokens": 95}, {"logit_bias": {10**6: 1.0}}])
def test_a_request_that_cannot_be_served_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        _run(FakeEngine(context_length=100), **params)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError):
        _run(FakeEngine(), "")


def test_failures_come_on_demand_and_once() -> None:
    engine = FakeEngine("abc")
    engine.fail_next(OSError("lost"), after_tokens=2)
    with pytest.raises(OSError, match="lost"):
        _run(engine, temperature=0)
    assert _text(_run(engine, temperature=0, stop_token_ids=END)) == "abc"
    assert engine.stats().num_running == 0


def test_the_queue_holds_so_many_and_no_more() -> None:
    engine = FakeEngine("ab", max_running=2, max_waiting=2)

    async def one() -> int:
        return len([step async for step in engine.stream([20], SamplingParams(max_new_tokens=2))])

    async def five() -> list[Any]:
        return await asyncio.gather(*(one() for _ in range(5)), return_exceptions=True)

    results = asyncio.run(five())
    assert results[:4] == [2, 2, 2, 2]
    assert isinstance(results[4], EngineBusyError)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.requests_finished_total) == (0, 0, 4)


def test_closing_a_stream_frees_its_place_running_or_waiting() -> None:
    engine = FakeEngine(max_running=1)

    async def leave() -> None:
        running: Any = engine.stream([20], SamplingParams())
        await anext(running)
        waiting = asyncio.create_task(anext(engine.stream([20], SamplingParams())))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await running.aclose()

    asyncio.run(leave())
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.cache_blocks_used) == (0, 0, 0)


def test_closing_the_engine_aborts_what_runs_and_what_waits() -> None:
    engine = FakeEngine(max_running=1)

    async def last_reason() -> Any:
        params = SamplingParams(max_new_tokens=50)
        return [step.finish_reason async for step in engine.stream([20], params)][-1]

    async def close_early() -> list[Any]:
        tasks = [asyncio.create_task(last_reason()) for _ in range(3)]
        await asyncio.sleep(0)
        engine.close()
        return await asyncio.gather(*tasks)

    assert asyncio.run(close_early()) == ["abort"] * 3
