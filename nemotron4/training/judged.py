"""Judged answers of a step, and the numbers that a step reports of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemotron4.records import Generation
from nemotron4.training.engine import StepOutcome, add_totals
from nemotron4.training.policy import AnswerSample
from nemotron4.training.rollouts import PromptSample, RewardVerdict
from nemotron4.training.samples import Segment


@dataclass(frozen=True)
class Judged:
    """One answer of a step. ``prompt`` is the place of its prompt among the step's prompts."""

    prompt: int
    generation: Generation
    verdict: RewardVerdict
    sample: AnswerSample
    staleness: int = 0  # updates of the policy after the weights that wrote it


def answer_sample(prompt: PromptSample, generation: Generation) -> AnswerSample:
    front = prompt.segments[0].tokens
    answer = generation.token_ids
    segment = Segment((*front, *answer), (*[False] * len(front), *[True] * len(answer)))
    return AnswerSample((segment,), where=prompt.where)


def reward_of(answer: Judged) -> float:
    """Of an answer that has one."""
    assert answer.verdict.value is not None, "answers without a reward have been left out"
    return answer.verdict.value


def groups_of(answers: Sequence[Judged]) -> list[list[Judged]]:
    """The answers by their prompts."""
    groups: dict[int, list[Judged]] = {}
    for answer in answers:
        groups.setdefault(answer.prompt, []).append(answer)
    return list(groups.values())


def differ(group: Sequence[Judged]) -> bool:
    """Whether the answers to a prompt have different rewards, without which there is nothing to learn."""
    return len({answer.verdict.value for answer in group}) > 1


def rollout_metrics(answers: Sequence[Judged]) -> dict[str, float]:
    """Reward, length, and the shares of answers and prompts that cannot teach anything."""
    judged = [answer for answer in answers if answer.verdict.value is not None]
    rewards = [reward_of(answer) for answer in judged]
    lengths = [len(answer.generation.token_ids) for answer in answers]
    metrics: dict[str, float] = {}
    if rewards:
        # Equal rewards have no deviation, and not one of the mean's rounding error.
        mean = rewards[0] if len(set(rewards)) == 1 else sum(rewards) / len(rewards)
        metrics["reward"] = mean
        metrics["reward_std"] = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    groups = groups_of(judged)
    metrics |= {
        "length": sum(lengths) / len(lengths),
        "share_unfinished": sum(a.generation.finish_reason != "stop" for a in answers) / len(answers),
        "share_without_reward": 1 - len(rewards) / len(answers),
    }
    if len(rewards) > len(groups):
        metrics["share_equal_groups"] = sum(not differ(group) for group in groups) / len(groups)
    return metrics


def has_one_reward(path: Path) -> bool:
    """Whether all answers in a run's record, also from before an interruption, had the same reward."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found = {(line["reward"], line["reward_std"]) for line in lines if line["kind"] == "train"}
    return len(found) == 1 and found.pop()[1] == 0


def divergences(answers: Sequence[Judged], temperature: float) -> dict[str, float]:
    """KL to the reference (k3, per token), and how far sampler and trainer are apart."""
    metrics: dict[str, float] = {}
    rows = [answer for answer in answers if answer.sample.logprobs]
    if rows and rows[0].sample.reference_logprobs:
        policy = torch.tensor([x for a in rows for x in a.sample.logprobs], dtype=torch.float64)
        reference = torch.tensor([x for a in rows for x in a.sample.reference_logprobs], dtype=torch.float64)
        log_ratio = reference - policy
        metrics["kl"] = float((torch.expm1(log_ratio) - log_ratio).mean())
    if rows and temperature == 1:
        pairs = [
            (x, y) for a in rows for x, y in zip(a.sample.logprobs, a.generation.logprobs or (), strict=True)
        ]
        metrics["sampler_gap"] = max(abs(x - y) for x, y in pairs)
    if any(answer.sample.weights for answer in rows):
        weights = [weight for answer in rows for weight in answer.sample.weights]
        metrics["importance"] = sum(weights) / len(weights)
        metrics["staleness"] = sum(answer.staleness for answer in rows) / len(rows)
    return metrics


def joined(results: Sequence[StepOutcome], summarise: Callable[[Any], dict[str, float]]) -> dict[str, float]:
    """Means over a step's updates: the loss over updates, the rest over tokens."""
    totals: dict[str, tuple[float, float]] = {}
    for result in results:
        add_totals(totals, result.totals)
    return {"loss": sum(result.loss for result in results) / len(results), **summarise(totals)}
