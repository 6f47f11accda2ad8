"""From answers to preference pairs, by one of the judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from nemotron4.client import Sampling
from nemotron4.records import ATTRIBUTES
from nemotron4.synth.judges import (
    CARD_WEIGHTS,
    LlmJudge,
    PairJudge,
    RankJudge,
    RewardJudge,
    Ruling,
    TruthJudge,
)
from nemotron4.synth.parsing import normalise
from nemotron4.synth.rows import Answered, JudgedPair, Row
from nemotron4.synth.stage import Context, Filtered, Kind, NoSettings


@dataclass(frozen=True)
class LlmKnobs:
    """``verdict``: written by the judge, one of three texts, or the likelier letter of its first token."""

    verdict: Literal["text", "choice", "logprob"] = "text"


@dataclass(frozen=True)
class RewardKnobs:
    """Pairs need a gap of ``min_gap`` and a chosen answer of at least ``min_helpfulness``."""

    min_gap: float = 0.0
    min_helpfulness: float = 0.0
    weights: dict[str, float] = field(default_factory=lambda: dict(CARD_WEIGHTS))

    def __post_init__(self) -> None:
        unknown = set(self.weights) - set(ATTRIBUTES)
        if unknown:
            raise ValueError(f"weights has the unknown {sorted(unknown)}; known: {', '.join(ATTRIBUTES)}")


def _pair(answered: Answered, ruling: Ruling, judge: PairJudge) -> JudgedPair:
    """The best against the worst answer; the first of equals."""
    values = ruling.values
    best, worst = values.index(max(values)), values.index(min(values))
    if values[best] == values[worst]:
        raise Filtered("no gap", f"every answer has the value {values[best]:g}")
    chosen, rejected = answered.responses[best], answered.responses[worst]
    return JudgedPair(
        prompt=answered.prompt,
        chosen=chosen,
        rejected=rejected,
        judge=judge.name,
        chosen_reward=values[best],
        rejected_reward=values[worst],
        scores={**ruling.scores, "values": list(values), "chosen": best, "rejected": worst},
    )


async def _judge(answered: Answered, context: Context, judge: PairJudge) -> JudgedPair:
    if len({normalise(response.text) for response in answered.responses}) == 1:
        raise Filtered("identical answers", f"all {len(answered.responses)} answers say the same")
    return _pair(answered, await judge.rule(answered, context), judge)


async def judge_truth(answered: Answered, context: Context, knobs: NoSettings) -> Sequence[Row]:
    """Answers -> one right against one wrong."""
    try:
        return [await _judge(answered, context, TruthJudge())]
    except Filtered as drop:
        if drop.rule != "no gap":
            raise
        all_right = drop.message.endswith("1")
        raise Filtered("all right" if all_right else "all wrong", drop.message) from None


async def judge_llm(answered: Answered, context: Context, knobs: LlmKnobs) -> Sequence[Row]:
    """Two answers -> a pair on which the judge agrees with itself."""
    return [await _judge(answered, context, LlmJudge(knobs.verdict))]


async def judge_rank(answered: Answered, context: Context, knobs: NoSettings) -> Sequence[Row]:
    """Two answers or more -> the best against the worst of a ranking; all values stay with the pair."""
    return [await _judge(answered, context, RankJudge())]


async def judge_reward(answered: Answered, context: Context, knobs: RewardKnobs) -> Sequence[Row]:
    """Answers -> the best against the worst by the reward model."""
    judged = await _judge(answered, context, RewardJudge(knobs.weights))
    assert judged.chosen_reward is not None
    assert judged.rejected_reward is not None
    gap = judged.chosen_reward - judged.rejected_reward
    if gap < knobs.min_gap:
        raise Filtered("small gap", f"{gap:.3f}; at least {knobs.min_gap:g} is asked")
    helpfulness = judged.scores["attributes"][judged.scores["chosen"]][0]
    if helpfulness < knobs.min_helpfulness:
        raise Filtered(
            "low helpfulness", f"{helpfulness:.3f} for the chosen one; at least {knobs.min_helpfulness:g}"
        )
    return [judged]


MANY = 1000  # more answers to one prompt than anybody asks for
KINDS = {
    "judge_truth": Kind(
        summary="pairs by ground truth: constraints, tests, or the known answer",
        takes=(Answered,), makes=JudgedPair, run=judge_truth, version=2,
        compares=(2, MANY), calls=lambda knobs: 0, fan_out=lambda knobs: 0.45,
    ),
    "judge_llm": Kind(
        summary="pairs by a model that compares both orders",
        takes=(Answered,), makes=JudgedPair, knobs=LlmKnobs, run=judge_llm,
        prompts=("judge_pair", "judge_pair_letter"), sampling=Sampling(temperature=0.0, max_tokens=256),
        compares=(2, 2), needs=lambda knobs: "log-probabilities" if knobs.verdict == "logprob" else "",
        calls=lambda knobs: 2, fan_out=lambda knobs: 0.65,
    ),
    "judge_rank": Kind(
        summary="pairs by a ranking: a model compares every two answers in both orders",
        takes=(Answered,), makes=JudgedPair, run=judge_rank, prompts=("judge_pair_letter",),
        compares=(2, MANY), needs=lambda _: "log-probabilities",
        sampling=Sampling(temperature=0.0, max_tokens=1), calls=lambda _: 2, fan_out=lambda _: 0.95,
    ),
    "judge_reward": Kind(
        summary="pairs by a reward model's weighted attributes",
        takes=(Answered,), makes=JudgedPair, knobs=RewardKnobs, run=judge_reward,
        compares=(2, MANY), needs=lambda knobs: "rewards",
        sampling=Sampling(), calls=lambda knobs: 2, fan_out=lambda knobs: 0.75,
    ),
}  # fmt: skip
