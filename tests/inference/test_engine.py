"""The engine on small random models: against transformers, against itself alone, and under pressure."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from transformers import NemotronForCausalLM

from nemotron4.engine import SamplingParams, TokenStep, derive_seed
from nemotron4.errors import EngineBusyError, RequestError
from nemotron4.inference.engine import Engine
from nemotron4.model.config import ModelConfig
from nemotron4.model.transformer import Transformer
from nemotron4.text.answers import EMBEDDING, AnswerText, run, text_request
from tests.inference.small_engine import (
    PATHS,
    SMALL,
    EnginePath,
    random_model,
    random_prompts,
    small_engine,
)
from tests.peers import nemotron_config


def slow_greedy(model: Transformer, prompt_ids: list[int], count: int) -> list[int]:
    """The obvious way: a full forward pass for every token."""
    ids = list(prompt_ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def token_ids(engine: Engine, prompts: list[list[int]], **settings: object) -> list[tuple[int, ...]]:
    return [g.token_ids for g in engine.generate(prompts, ignore_eos=True, **settings)]  # type: ignore[arg-type]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true within 20 s"
        time.sleep(0.005)


def test_greedy_tokens_equal_transformers_generate_for_mixed_lengths() -> None:
    peer = NemotronForCausalLM(nemotron_config(SMALL)).eval()
    model = random_model()
    peer.load_state_dict(model.state_dict(), strict=True)
    prompts = random_prompts(1, 40, 7, 97, 32, 33)
    with small_engine(model) as engine:
        actual = token_ids(engine, prompts, max_new_tokens=40, temperature=0)
    for prompt, new in zip(prompts, actual, strict=True):
        ids = torch.tensor([prompt])
        expected = peer.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        assert list(new) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"norm": "rmsnorm", "mlp": "swiglu", "rotary_fraction": 1.0, "tie_embeddings": True},
        {"num_kv_heads": 6},
        {"num_kv_heads": 1, "head_dim": 24},
        {"attention_bias": True},
    ],
    ids=["llama", "mha", "mqa", "bias"],
)
def test_cached_decoding_equals_the_full_forward_pass(change: dict[str, object]) -> None:
    config = ModelConfig(**{**SMALL.__dict__, **change})  # type: ignore[arg-type]
    plain, prompts = random_model(config), random_prompts(5, 70)
    expected = [slow_greedy(plain, prompt, 12) for prompt in prompts]
    with small_engine(random_model(config)) as engine:
        assert [list(t) for t in token_ids(engine, prompts, max_new_tokens=12, temperature=0)] == expected


SETTINGS = {"max_new_tokens": 70, "temperature": 1.3, "top_k": 40, "top_p": 0.95, "seed": 11, "logprobs": 0}
SETTINGS["ignore_eos"] = True


every_path = pytest.mark.parametrize("path", PATHS)


def alone(prompts: list[list[int]], path: EnginePath) -> list[object]:
    """Each prompt in an engine of its own."""
    results = []
    for prompt in prompts:
        with small_engine(path=path) as engine:
            results += engine.generate([prompt], **SETTINGS)  # type: ignore[arg-type]
    return results


@every_path
def test_tokens_and_logprobs_are_the_same_bits_alone_and_in_any_batch(path: EnginePath) -> None:
    prompts = random_prompts(3, 31, 32, 33, 64, 65, 100, 127, 200, 5)
    expected = alone(prompts, path)
    with small_engine(path=path) as engine:
        assert engine.generate(prompts, **SETTINGS) == expected  # type: ignore[arg-type]
    with small_engine(path=path, max_running=3, max_step_tokens=32) as engine:
        assert engine.generate(prompts[::-1], **SETTINGS) == expected[::-1]  # type: ignore[arg-type]


@every_path
def test_preemption_changes_no_bit_and_loses_nothing(path: EnginePath) -> None:
    prompts = random_prompts(30, 60, 90, 33, 10, 70)
    expected = alone(prompts, path)
    with small_engine(path=path, num_blocks=9) as engine:
        assert engine.generate(prompts, **SETTINGS) == expected  # type: ignore[arg-type]
        assert engine.stats().preemptions_total > 0
        wait_until(lambda: engine.stats().cache_blocks_used == 0)


@every_path
def test_shared_prefixes_are_computed_once_and_change_no_bit(path: EnginePath) -> None:
    [prefix] = random_prompts(96)
    prompts = [prefix + tail for tail in random_prompts(1, 20, 40, seed=1)]
    expected = alone(prompts, path)
    with small_engine(path=path) as engine:
        assert engine.generate(prompts, **SETTINGS) == expected  # type: ignore[arg-type]
        assert engine.stats().prompt_tokens_reused_total == 2 * 96
        assert engine.generate(prompts, **SETTINGS) == expected  # type: ignore[arg-type]


@every_path
def test_endings_of_one_prompt_are_scored_without_computing_it_again(path: EnginePath) -> None:
    [prompt] = random_prompts(100)
    rows = [prompt + ending for ending in random_prompts(1, 3, 40, seed=1)]
    asked = {"max_new_tokens": 0, "prompt_logprobs": 0}
    with small_engine(path=path) as engine:
        for row in rows:
            [whole] = asyncio.run(steps_of(engine, row, **asked))
            [last] = asyncio.run(steps_of(engine, row, **asked, prompt_logprobs_from=99))
            assert last.prompt_logprobs == (whole.prompt_logprobs or ())[99:]
            assert len(last.prompt_logprobs or ()) == len(row) - 100
        assert engine.stats().prompt_tokens_reused_total == 2 * 96


@pytest.mark.parametrize("path", ["torch-bfloat16", "torch-float16", "bfloat16", "int8"])
def test_short_types_score_near_float32(path: EnginePath) -> None:
    rows = random_prompts(5, 40, 70)
    with small_engine() as engine:
        expected = engine.score(token_ids=rows)
    with small_engine(path=path) as engine:
        assert engine.info.dtype == path.removeprefix("torch-")
        for actual, wanted in zip(engine.score(token_ids=rows), expected, strict=True):
            assert torch.tensor(actual).sub(torch.tensor(wanted)).abs().mean() < 0.1


def test_samples_of_one_prompt_differ_and_share_its_blocks() -> None:
    [prompt] = random_prompts(80)
    with small_engine() as engine:
        samples = engine.generate([prompt], n=4, seed=5, max_new_tokens=20)
        assert engine.stats().prompt_tokens_reused_total == 3 * 64
        again = [engine.generate([prompt], seed=derive_seed(5, i), max_new_tokens=20)[0] for i in range(4)]
    assert len({s.token_ids for s in samples}) == 4
    assert samples == again


def test_without_a_seed_two_runs_differ() -> None:
    with small_engine() as engine:
        [first], [second] = (token_ids(engine, random_prompts(5), max_new_tokens=30) for _ in range(2))
    assert first != second


def test_scores_equal_the_full_forward_pass() -> None:
    rows = random_prompts(2, 50, 150)
    model = random_model()
    expected = []
    for row in rows:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([row]))[0], -1)
        expected.append([float(logprobs[i, row[i + 1]]) for i in range(len(row) - 1)])
    with small_engine() as engine:
        actual = engine.score(token_ids=rows)
        assert engine.score(token_ids=rows) == actual
        assert engine.score(token_ids=[[40]]) == [[]]
    for a, e in zip(actual, expected, strict=True):
        assert a == pytest.approx(e, abs=1e-4)


@pytest.mark.parametrize("path", ["torch-float32", "float32"])
def test_an_embedding_is_the_mean_of_the_last_hidden_states(path: EnginePath) -> None:
    rows = random_prompts(1, 33, 150, 90)
    model = random_model()
    expected = [functional.normalize(model.hidden(torch.tensor([row]))[0].mean(0), dim=0) for row in rows]
    # So few blocks that rows are set back while their prompts are computed.
    with small_engine(path=path, num_blocks=7, max_step_tokens=32) as engine:
        engine.generate(rows, max_new_tokens=1)  # what is in the cache is computed again

        async def embed() -> list[AnswerText]:
            requests = (text_request(engine, row, EMBEDDING) for row in rows)
            return await asyncio.gather(*(run(engine, request) for request in requests))

        found = asyncio.run(embed())
    for answer, vector in zip(found, expected, strict=True):
        assert answer.embedding() == pytest.approx(vector.tolist(), abs=1e-4)


def test_logprobs_are_raw_whatever_the_sampling() -> None:
    [prompt] = random_prompts(10)
    with small_engine() as engine:
        [generated] = engine.generate(
            [prompt], max_new_tokens=8, temperature=0.3, top_k=5, seed=1, logprobs=0
        )
        [scores] = engine.score(token_ids=[prompt + list(generated.token_ids)])
    assert generated.logprobs == pytest.approx(scores[-8:], abs=1e-4)


def test_stop_strings_straddle_tokens_and_are_cut() -> None:
    with small_engine() as engine:
        [free] = engine.generate(["HELLO"], max_new_tokens=30, temperature=0, ignore_eos=True)
        stop = free.text[4:7]
        [stopped] = engine.generate(["HELLO"], max_new_tokens=30, temperature=0, ignore_eos=True, stop=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text.partition(stop)[0]
    assert free.token_ids[: len(stopped.token_ids)] == stopped.token_ids


def test_stop_tokens_end_a_text_without_appearing_in_it() -> None:
    [prompt] = random_prompts(6)
    with small_engine() as engine:
        [free] = engine.generate([prompt], max_new_tokens=30, temperature=0)
        stop_id = free.token_ids[5]
        end = free.token_ids.index(stop_id)
        [stopped] = engine.generate([prompt], max_new_tokens=30, temperature=0, stop_token_ids=[stop_id])
    assert stopped.token_ids == free.token_ids[: end + 1]
    assert stopped.finish_reason == "stop"
    assert not stopped.text.endswith(chr(stop_id)) or stopped.text == free.text[:end]


def test_minimum_tokens_mask_the_given_ids_only_until_then() -> None:
    [prompt] = random_prompts(6)
    with small_engine() as engine:
        [free] = token_ids(engine, [prompt], max_new_tokens=10, temperature=0)
        [masked] = token_ids(
            engine, [prompt], max_new_tokens=10, temperature=0, min_new_tokens=1, min_tokens_masks={free[0]}
        )
    assert masked[0] != free[0]


async def steps_of(engine: Engine, prompt: list[int], **settings: object) -> list[TokenStep]:
    params = SamplingParams(**settings)  # type: ignore[arg-type]
    return [step async for step in engine.stream(prompt, params)]


def test_streams_give_the_tokens_of_generate() -> None:
    prompts = random_prompts(4, 50)

    async def both() -> list[list[TokenStep]]:
        return await asyncio.gather(*(steps_of(engine, p, max_new_tokens=9, temperature=0) for p in prompts))

    with small_engine() as engine:
        streamed = asyncio.run(both())
        expected = token_ids(engine, prompts, max_new_tokens=9, temperature=0)
    assert [tuple(s.token_id for s in steps) for steps in streamed] == expected
    assert [s.finish_reason for s in streamed[0]] == [None] * 8 + ["length"]


def test_leaving_a_stream_frees_its_blocks() -> None:
    async def leave_early() -> None:
        stream = engine.stream(random_prompts(70)[0], SamplingParams(max_new_tokens=900))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]

    with small_engine() as engine:
        asyncio.run(leave_early())
        wait_until(lambda: engine.stats().num_running == 0)
        assert engine.stats().cache_blocks_used == 0


def test_full_log_probabilities_cover_the_vocabulary() -> None:
    with small_engine() as engine:
        steps = asyncio.run(
            steps_of(engine, [40, 41], max_new_tokens=1, prompt_logprobs=2, logprobs=3, full_logprobs=True)
        )
    [step] = steps
    assert step.logprobs is not None
    assert step.prompt_logprobs is not None
    for position in (step.logprobs, *step.prompt_logprobs):
        assert position.full is not None
        assert len(position.full) == SMALL.vocab_size
        assert position.full[position.chosen.token_id] == position.chosen.logprob
        assert position.top[0].logprob == max(position.full)
    assert len(step.logprobs.top) == 3


@pytest.mark.parametrize(
    ("prompt", "settings", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([101], {}, "token id 101, which is outside the vocabulary"),
        (
            [40] * 1000,
            {"max_new_tokens": 25},
            "1000 tokens and 25 new ones .* above the context length of 1024",
        ),
        ([40], {"logit_bias": {500: 1.0}}, "logit_bias names token id 500"),
        ([40], {"temperature": -1.0}, "temperature is -1.0"),
        ([40], {"max_new_tokens": 3.5}, "max_new_tokens is 3.5; expected a whole number"),
        ([40], {"temperature": "0.5"}, "temperature is '0.5'; expected a finite number"),
        ([40], {"logit_bias": {5: float("nan")}}, "logit_bias has 5: nan"),
        ([40], {"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300"),
    ],
)
def test_impossible_requests_are_refused(prompt: list[int], settings: dict[str, object], words: str) -> None:
    with small_engine() as engine:
        with pytest.raises(RequestError, match=words):
            engine.generate([prompt], **settings)  # type: ignore[arg-type]
        assert len(token_ids(engine, [[40]], max_new_tokens=3)[0]) == 3


def test_a_request_larger_than_the_cache_is_refused() -> None:
    with small_engine(num_blocks=4) as engine, pytest.raises(RequestError, match="there are 128"):
        engine.generate([[40] * 100], max_new_tokens=100)


def test_a_full_queue_answers_busy_and_recovers() -> None:
    async def crowd() -> list[object]:
        return await asyncio.gather(
            *(steps_of(engine, [40], max_new_tokens=200) for _ in range(40)), return_exceptions=True
        )

    with small_engine(max_running=1, max_waiting=4) as engine:
        outcomes = asyncio.run(crowd())
        assert any(isinstance(outcome, EngineBusyError) for outcome in outcomes)
        assert any(isinstance(outcome, list) and len(outcome) == 200 for outcome in outcomes)
        assert len(token_ids(engine, [[40]], max_new_tokens=3)[0]) == 3


def test_closing_aborts_what_runs() -> None:
    async def run() -> TokenStep:
        async for step in engine.stream([40], SamplingParams(max_new_tokens=1000)):
            if step.finish_reason is None:
                asyncio.get_running_loop().run_in_executor(None, engine.close)
        return step

    engine = small_engine()
    assert asyncio.run(run()).finish_reason == "abort"


def test_closing_between_two_steps_is_not_missed() -> None:
    class Late(threading.Event):
        """A close arrives in the last moment before the loop clears the event."""

        def clear(self) -> None:
            engine._is_closing = True
            self.set()
            super().clear()

    engine = small_engine(random_model())
    before, engine._wake = engine._wake, Late()
    before.set()  # the loop leaves the old event and goes on with the new one
    wait_until(lambda: not engine._thread.is_alive())


def test_a_failing_step_costs_only_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_engine() as engine:
        original = engine._runner.run

        def explode(slices: object) -> object:
            monkeypatch.setattr(engine._runner, "run", original)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine._runner, "run", explode)
        with pytest.raises(Exception, match="could not be computed: out of memory"):
            engine.generate([[40]], max_new_tokens=3)
        assert len(token_ids(engine, [[40]], max_new_tokens=3)[0]) == 3
        assert engine.stats().cache_blocks_used == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_ends_by_a_mistake_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*, admits: bool) -> object:
        raise KeyError("a block")

    with small_engine() as engine:
        monkeypatch.setattr(engine._scheduler, "plan", explode)
        with pytest.raises(Exception, match="the engine ended by a mistake: KeyError"):
            engine.generate([[40]], max_new_tokens=3)
        with pytest.raises(RequestError, match="the engine is closed"):
            engine.generate([[40]], max_new_tokens=3)
