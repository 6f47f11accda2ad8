"""The loss law: value and gradient do not depend on how a step is cut into rows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from nemotron4.errors import DataError, TrainingError
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.objectives import (
    BradleyTerryObjective,
    JudgedObjective,
    LikelihoodObjective,
    PairObjective,
    RegressionObjective,
)
from nemotron4.training.packing import pack, plan_rows
from nemotron4.training.preference_settings import PreferenceSection
from nemotron4.training.samples import Sample, Segment
from nemotron4.training.scorer import Scorer, checkpoint_activations
from nemotron4.training.stage import Objective
from tests.training import tiny


def preference(**settings: object) -> PreferenceSection:
    return PreferenceSection(**{"loss": "dpo", "beta": 0.3, **settings})  # type: ignore[arg-type]


CASES: dict[str, tuple[Objective, str]] = {
    "sft": (LikelihoodObjective(), "texts"),
    "dpo": (PairObjective(preference()), "pairs"),
    "dpo_with_sft_averaged": (PairObjective(preference(sft_weight=0.5, average_logprobs=True)), "pairs"),
    "ipo": (PairObjective(preference(loss="ipo")), "pairs"),
    "rpo_bwd_kl": (PairObjective(preference(loss="rpo", sft_weight=0.1)), "pairs"),
    "rpo_fwd_kl": (PairObjective(preference(loss="rpo", distance="fwd_kl")), "pairs"),
    "rpo_sq": (PairObjective(preference(loss="rpo", distance="sq")), "pairs"),
    "kto": (JudgedObjective(preference(loss="kto")), "judged"),
    "regression": (RegressionObjective(("a", "b", "c")), "scored"),
    "bradley_terry": (BradleyTerryObjective("regular", 1), "pairs"),
    "bradley_terry_scaled": (BradleyTerryObjective("scaled", 1), "pairs"),
}


def scorer_for(stage: Objective) -> Scorer:
    is_reward = isinstance(stage, RegressionObjective | BradleyTerryObjective)
    return tiny.reward_scorer() if is_reward else tiny.logprob_scorer()


def outcome(stage: Objective, samples: list[Sample], row_tokens: int):
    scorer = scorer_for(stage)
    engine = TrainingEngine(scorer)
    rows = engine.rows(samples, row_tokens)
    result = engine.forward_backward(rows, stage)
    gradients = {name: p.grad for name, p in engine.trainable.items() if p.grad is not None}
    return result, gradients, len(rows)


@pytest.mark.parametrize("name", CASES)
def test_packed_rows_give_the_loss_and_gradient_of_single_samples(name: str) -> None:
    stage, maker = CASES[name]
    samples = getattr(tiny, maker)(9)
    longest = max(sample.num_tokens for sample in samples)
    alone = [outcome(stage, [sample], longest)[2] for sample in samples]
    assert alone == [1] * 9
    whole, whole_gradients, num_rows = outcome(stage, samples, 10_000)
    assert num_rows == 1
    # Rows this short hold one or two samples each.
    cut, cut_gradients, num_rows = outcome(stage, samples, longest)
    assert num_rows > 3
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6, abs=1e-6)
    assert cut.totals.keys() == whole.totals.keys()
    for metric in cut.totals:
        assert cut.totals[metric] == pytest.approx(whole.totals[metric], rel=2e-5, abs=1e-5)
    assert cut_gradients.keys() == whole_gradients.keys()
    # float32 rounds relative to what is added up, and so is the bound: ipo's gradient reaches 33, kto's 0.04.
    largest = max(float(gradient.abs().max()) for gradient in whole_gradients.values())
    for key in cut_gradients:
        torch.testing.assert_close(cut_gradients[key], whole_gradients[key], rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("name", CASES)
def test_the_count_known_from_the_data_is_the_loss_functions_own(name: str) -> None:
    stage, maker = CASES[name]
    samples = getattr(tiny, maker)(4)
    engine = TrainingEngine(scorer_for(stage))
    for row in engine.rows(samples, 64):
        assert float(stage.terms(engine.score(row), row).loss.count) == stage.count(row)


def test_gradients_made_with_the_logits_equal_those_made_from_them_again() -> None:
    class Unforeseen(LikelihoodObjective):
        has_known_slope = False

    samples = tiny.texts(9)
    for row_tokens in (20, 10_000):
        result, gradients, _ = outcome(LikelihoodObjective(), samples, row_tokens)
        again, expected, _ = outcome(Unforeseen(), samples, row_tokens)
        assert result == again
        assert gradients.keys() == expected.keys()
        for key in gradients:
            torch.testing.assert_close(gradients[key], expected[key], rtol=1e-6, atol=1e-7)


def test_neighbours_of_one_length_do_not_see_each_other() -> None:
    tokens = torch.randint(tiny.VOCABULARY, (30,), generator=torch.Generator().manual_seed(5)).tolist()
    bounds = [0, 5, 10, 17, 24, 30]  # lengths 5, 5, 7, 7, 6
    samples = [
        Sample((Segment(tuple(tokens[start:stop]), (True,) * (stop - start)),))
        for start, stop in pairwise(bounds)
    ]
    scorer = tiny.logprob_scorer()
    alone = torch.cat([scorer(pack([sample])) for sample in samples])
    torch.testing.assert_close(scorer(pack(samples)), alone, rtol=1e-6, atol=1e-6)
    whole, whole_gradients, _ = outcome(LikelihoodObjective(), samples, 30)
    cut, cut_gradients, _ = outcome(LikelihoodObjective(), samples, 7)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    for key in cut_gradients:
        torch.testing.assert_close(cut_gradients[key], whole_gradients[key], rtol=1e-5, atol=1e-6)


def test_packed_logprobs_equal_the_plain_forward_pass() -> None:
    scorer = tiny.logprob_scorer()
    samples = tiny.texts(5)
    packed = scorer(pack(samples))
    expected = []
    for sample in samples:
        (segment,) = sample.segments
        logits_TV = scorer.net(torch.tensor([segment.tokens]))[0].log_softmax(-1)
        expected += [
            logits_TV[i - 1, token]
            for i, (token, is_trained) in enumerate(zip(segment.tokens, segment.is_trained, strict=True))
            if is_trained
        ]
    torch.testing.assert_close(packed, torch.stack(expected), rtol=1e-6, atol=1e-6)


def shared_pairs(num: int = 3, prompt: int = 24) -> list[Sample]:
    """Pairs of one prompt each, and one pair whose segments have nothing in common."""
    generator = torch.Generator().manual_seed(8)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(tiny.VOCABULARY, (length,), generator=generator).tolist())

    made = []
    for i in range(num):
        asked = ids(prompt + i)
        answers = [ids(3 + i), ids(6)]
        segments = [
            Segment((*asked, *answer), (*[False] * len(asked), *[True] * len(answer))) for answer in answers
        ]
        made.append(Sample(tuple(segments), labels=(1.0, -0.5), reference=(-20.0, -21.0)))
    return [*made, *tiny.pairs(1)]


@pytest.mark.parametrize("makes_scorer", [tiny.logprob_scorer, tiny.reward_scorer])
def test_answers_that_share_their_prompt_have_the_numbers_of_answers_apart(
    makes_scorer: Callable[[], Scorer],
) -> None:
    samples = shared_pairs()
    scorer = makes_scorer()
    rows = [pack(samples, shares=shares, pad_to=400) for shares in (True, False)]
    used = [len(row.tokens_N) - row.num_padding for row in rows]
    assert used[1] - used[0] == sum(24 + i for i in range(3))
    assert used[0] == sum(sample.packed_tokens for sample in samples)
    found = []
    for row in rows:
        scores = scorer(row)
        loss = (scores * torch.linspace(-1, 2, scores.numel()).view_as(scores)).sum()
        found.append((scores, *torch.autograd.grad(loss, list(scorer.parameters()), allow_unused=True)))
    for shared, apart in zip(*found, strict=True):
        assert (shared is None) == (apart is None)
        if shared is not None:
            torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5)


def test_an_answer_that_trains_its_beginning_shares_no_trained_token() -> None:
    tokens = tuple(range(1, 40))
    segments = (
        Segment((*tokens, 50, 51), (*[False] * 30, *[True] * 11)),
        Segment((*tokens, 52), (*[False] * 33, *[True] * 7)),
    )
    assert Sample(segments).num_shared == 30
    short = Sample(tuple(Segment(s.tokens[25:], s.is_trained[25:]) for s in segments))
    assert short.num_shared == 0
    scorer = tiny.logprob_scorer()
    scores = [scorer(pack([Sample(segments)], shares=shares)) for shares in (True, False)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)


def test_a_packed_preference_step_is_the_same_with_the_prompts_shared_or_not() -> None:
    objective = PairObjective(PreferenceSection(loss="rpo", beta=0.3, sft_weight=0.1))
    engine = TrainingEngine(tiny.logprob_scorer())
    shared = engine.forward_backward([pack(shared_pairs())], objective)
    gradients = [p.grad.clone() for p in engine.trainable.values()]
    engine.scorer.zero_grad()
    apart = engine.forward_backward([pack(shared_pairs(), shares=False)], objective)
    assert shared.loss == pytest.approx(apart.loss, rel=1e-6)
    assert shared.num_tokens == apart.num_tokens
    for got, want in zip(gradients, engine.trainable.values(), strict=True):
        torch.testing.assert_close(got, want.grad, rtol=1e-4, atol=1e-6)


def test_padding_a_row_changes_nothing() -> None:
    scorer = tiny.logprob_scorer()
    samples = tiny.texts(3)
    torch.testing.assert_close(scorer(pack(samples, pad_to=64)), scorer(pack(samples)), rtol=1e-6, atol=1e-6)


def test_llama_shaped_models_pack_too() -> None:
    shape = {"norm": "rmsnorm", "mlp": "swiglu", "tie_embeddings": True, "rotary_fraction": 1.0}
    samples = tiny.texts(4)
    scorer = tiny.logprob_scorer(**shape)
    alone = torch.cat([scorer(pack([sample])) for sample in samples])
    torch.testing.assert_close(scorer(pack(samples)), alone, rtol=1e-6, atol=1e-6)


def test_rows_hold_every_sample_once_and_no_row_is_over_full() -> None:
    lengths = [5, 9, 1, 7, 3, 3, 9, 2]
    rows = plan_rows(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(8))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert len(rows) == 4


def test_a_sample_longer_than_a_row_is_refused_with_numbers() -> None:
    with pytest.raises(DataError, match="12 tokens does not fit in a row of 10"):
        plan_rows([3, 12], 10)


def test_a_non_finite_loss_names_the_rows() -> None:
    scorer = tiny.logprob_scorer()
    with torch.no_grad():
        scorer.net.lm_head.weight[0, 0] = float("nan")
    engine = TrainingEngine(scorer)
    with pytest.raises(TrainingError, match=r"texts\.jsonl:1, texts\.jsonl:2"):
        engine.forward_backward(engine.rows(tiny.texts(2), 64), LikelihoodObjective())


def test_a_step_that_trains_nothing_is_an_error() -> None:
    engine = TrainingEngine(tiny.logprob_scorer())
    silent = Sample((Segment((1, 2, 3), (False, False, False)),))
    with pytest.raises(TrainingError, match="trains anything"):
        engine.forward_backward(engine.rows([silent], 64), LikelihoodObjective())


def test_kto_baseline_is_the_mean_mismatched_log_ratio_of_the_whole_step() -> None:
    stage = JudgedObjective(preference(loss="kto"))
    engine = TrainingEngine(tiny.logprob_scorer())
    samples = tiny.judged(6)
    ratios = []
    for sample in samples:
        score = engine.score(pack([Sample((sample.segments[1],))]))
        ratios.append(float(score.sum()) - sample.reference[1])
    expected = max(0.0, sum(ratios) / 6)
    rows = engine.rows(samples, 40)
    prepared = stage.prepare(rows, engine.score, engine.add_up)
    assert isinstance(prepared, JudgedObjective)
    assert prepared.baseline == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_reward_correlation_is_pearsons() -> None:
    stage = PairObjective(preference(loss="rpo"))
    samples = tiny.pairs(8)
    engine = TrainingEngine(tiny.logprob_scorer())
    result = engine.evaluate(engine.rows(samples, 64), stage)
    margins, rewards = [], []
    for sample in samples:
        chosen, rejected = (
            float(engine.score(pack([Sample((segment,))])).sum()) for segment in sample.segments
        )
        margins.append(0.3 * (chosen - sample.reference[0] - rejected + sample.reference[1]))
        rewards.append(sample.labels[0] - sample.labels[1])
    expected = float(torch.corrcoef(torch.tensor([margins, rewards]))[0, 1])
    assert stage.summarise(result.totals)["reward_correlation"] == pytest.approx(expected, abs=1e-4)


def test_recomputed_activations_change_no_gradient() -> None:
    plain, recomputed = TrainingEngine(tiny.logprob_scorer()), TrainingEngine(tiny.logprob_scorer())
    checkpoint_activations(recomputed.scorer.net.model)
    for engine in (plain, recomputed):
        engine.forward_backward(engine.rows(tiny.texts(5), 64), LikelihoodObjective())
    assert plain.trainable.keys() == recomputed.trainable.keys()
    for name, parameter in plain.trainable.items():
        assert torch.equal(parameter.grad, recomputed.trainable[name].grad), name


def test_recomputed_blocks_keep_only_their_input() -> None:
    def kept_bytes(*, recompute: bool) -> int:
        scorer = tiny.logprob_scorer(num_layers=4)
        if recompute:
            checkpoint_activations(scorer.net.model)
        weights = {p.untyped_storage().data_ptr() for p in scorer.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = scorer(pack(tiny.texts(5)))
        assert scores.requires_grad
        return sum(kept.values())

    assert kept_bytes(recompute=True) < 0.5 * kept_bytes(recompute=False)
