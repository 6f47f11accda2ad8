"""Filters and penalties against the obvious full sort, and draws against the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from nemotron4.engine import SamplingParams
from nemotron4.inference import sampling


def slow_distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """The rules spelled out over the whole sorted vocabulary, (V,)."""
    scaled_V = logits_V.double() / params.temperature
    if params.top_k:
        kth = scaled_V.sort(descending=True).values[min(params.top_k, len(scaled_V)) - 1]
        scaled_V = scaled_V.masked_fill(scaled_V < kth, -torch.inf)
    probabilities_V = torch.softmax(scaled_V, 0)
    if params.top_p < 1:
        order = probabilities_V.argsort(descending=True, stable=True)
        before = 0.0
        for index in order.tolist():
            probability = float(probabilities_V[index])
            if before > params.top_p:
                probabilities_V[index] = 0
            before += probability
        probabilities_V /= probabilities_V.sum()
    probabilities_V[probabilities_V < params.min_p * probabilities_V.max()] = 0
    return probabilities_V / probabilities_V.sum()


def fast_distribution(logits_V: Tensor, params: SamplingParams) -> Tensor:
    ids_C, probabilities_C = sampling.candidates((logits_V / params.temperature).numpy(), params)
    out_V = torch.zeros(len(logits_V), dtype=torch.float64)
    out_V[slice(None) if ids_C is None else ids_C] = torch.from_numpy(probabilities_C).double()
    return out_V / out_V.sum()


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([3, 50, 1500]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 2000]),
    top_p=st.sampled_from([0.1, 0.53, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.07]),
    seed=st.integers(0, 1000),
)
def test_candidates_equal_the_full_sort(
    size: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    logits_V = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    torch.testing.assert_close(
        fast_distribution(logits_V, params), slow_distribution(logits_V, params), atol=1e-6, rtol=1e-5
    )


def test_top_k_keeps_every_tie() -> None:
    ids, _ = sampling.candidates(np.array([1.0, 3.0, 2.0, 2.0, 2.0]), SamplingParams(top_k=2))
    assert ids is not None
    assert ids.tolist() == [1, 2, 3, 4]


def test_top_p_keeps_the_crossing_token() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    ids, _ = sampling.candidates(logits, SamplingParams(top_p=0.6))
    assert ids is not None
    assert ids.tolist() == [0, 1]


def test_greedy_takes_the_first_largest() -> None:
    logits = np.array([1.0, 3.0, 3.0])
    params = SamplingParams(temperature=0, top_k=1, top_p=0.1)
    assert sampling.draw(logits, params, sampling.Points(0)) == 1


def test_draws_follow_the_distribution() -> None:
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    points = sampling.Points(0)
    draws = torch.tensor([sampling.draw(logits_V.numpy(), SamplingParams(), points) for _ in range(4000)])
    shares = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(shares, logits_V.exp(), atol=0.03, rtol=0)


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63 - 1])
def test_random_numbers_of_a_seed_are_those_of_torch(seed: int) -> None:
    generator, points = torch.Generator().manual_seed(seed), sampling.Points(seed)
    for _ in range(700):  # more than the 624 words of the generator's state
        assert points.next() == float(torch.rand((), dtype=torch.float64, generator=generator))


def test_repetition_penalty_equals_transformers() -> None:
    logits_V = torch.randn(30)
    prompt, new = [1, 5, 5], [7, 1]
    params = SamplingParams(repetition_penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + new]), logits_V[None].clone())
    adjusted = sampling.adjust(logits_V.numpy(), params, prompt_ids=prompt, new_ids=new)
    assert torch.equal(torch.from_numpy(adjusted), expected[0])


def test_presence_and_frequency_count_new_tokens_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    adjusted = sampling.adjust(np.zeros(4), params, prompt_ids=[0], new_ids=[1, 2, 2])
    assert adjusted.tolist() == [0.0, -0.75, -1.0, 0.0]


def test_bias_and_minimum_length() -> None:
    params = SamplingParams(logit_bias={0: 2.0}, min_new_tokens=2, min_tokens_masks=frozenset({3}))
    early = sampling.adjust(np.zeros(4), params, prompt_ids=[0], new_ids=[1])
    late = sampling.adjust(np.zeros(4), params, prompt_ids=[0], new_ids=[1, 1])
    assert early.tolist() == [2.0, 0.0, 0.0, -np.inf]
    assert late.tolist() == [2.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("num_top", [0, 3])
def test_logprobs_are_log_softmax(num_top: int) -> None:
    logits_RV = torch.randn(2, 9)
    expected = torch.log_softmax(logits_RV, -1)
    rows = sampling.logprobs(logits_RV.numpy(), [4, 8], vocab_size=9, num_top=num_top, is_full=True)
    for i, row in enumerate(rows):
        assert row.chosen.logprob == pytest.approx(float(expected[i, [4, 8][i]]))
        assert [t.token_id for t in row.top] == expected[i].topk(num_top).indices.tolist()
        assert row.full == pytest.approx(expected[i].tolist())


def test_rows_that_a_grammar_masks_are_drawn_together_as_alone() -> None:
    numbers = np.random.default_rng(0)
    kinds = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.8),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=5, min_p=0.1),
    )
    draws = []
    for count in (1, 2, 5, 50, 2000):
        for params in kinds:
            allowed_V = np.zeros(4000, np.bool_)
            allowed_V[numbers.integers(0, 4000, size=count)] = True
            logits_V = sampling.masked(numbers.normal(size=4000).astype(np.float32), allowed_V)
            draws.append((logits_V, params, float(numbers.random())))
    found = sampling.draw_rows(draws)
    assert found == [sampling.draw_at(*each) for each in draws]
    assert all(np.isfinite(logits_V[token]) for token, (logits_V, _, _) in zip(found, draws, strict=True))
