"""Settings of preference training, and KTO: single answers, judged good or bad, against a step's baseline.

Legend: S segments, B samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nemotron4.errors import ConfigError
from nemotron4.records import FieldError
from nemotron4.training import losses, rows
from nemotron4.training.encoding import Encoder, ReadRow, RowError, RowKind
from nemotron4.training.losses import SumCount
from nemotron4.training.packing import PackedRow
from nemotron4.training.rollout_settings import RolloutSection
from nemotron4.training.rows import Fields, Prompt
from nemotron4.training.samples import Sample
from nemotron4.training.scorer import segment_logprobs, trained_counts
from nemotron4.training.stage import AddUp, Objective, Score, Terms
from nemotron4.training.stages.sft import merging, never_stops


@dataclass(frozen=True, kw_only=True)
class PreferenceSection:
    """``loss`` rpo is Reward-aware Preference Optimization (arXiv 2406.11704), not TRL's former rpo_alpha."""

    loss: Literal["dpo", "ipo", "rpo", "kto"]
    beta: float
    eta: float = 1.0
    distance: Literal["bwd_kl", "fwd_kl", "sq"] = "bwd_kl"
    preference_weight: float = 1.0
    sft_weight: float = 0.0
    average_logprobs: bool = False  # per token instead of summed over the answer
    desirable_weight: float = 1.0  # kto
    undesirable_weight: float = 1.0
    pairs: Literal["rows", "online"] = "rows"  # online: the policy's best and worst answers to prompts
    rollouts: RolloutSection | None = None  # of online pairs

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ConfigError(f"preference.beta is {self.beta}; expected more than 0 (0 trains nothing)")
        if self.preference_weight == 0 and self.sft_weight == 0:
            raise ConfigError("preference.preference_weight and sft_weight are both 0: nothing would train")
        if (self.pairs == "online") != (self.rollouts is not None):
            raise ConfigError("preference.pairs = online goes with a table [preference.rollouts]")
        if self.loss == "kto" and self.pairs == "online":
            raise ConfigError("preference.pairs = online makes pairs; loss kto has none")
        if self.loss == "kto" and self.sft_weight:
            raise ConfigError("preference.sft_weight has no meaning for kto")


@dataclass(frozen=True, kw_only=True)
class JudgedRow:
    """``other``: an answer to another prompt, which serves the baseline."""

    prompt: Prompt
    answer: str
    is_desirable: bool
    other: str = ""


class JudgedKind(RowKind):
    """``prompt``, ``completion``, ``label`` (TRL), or ``prompt``, ``response``, ``preference`` (NeMo)."""

    name = "kto"

    def parse(self, row: Fields) -> JudgedRow:
        if "preference" in row:
            value, name = row["preference"], "response"
            if value not in ("chosen", "rejected"):
                raise FieldError(f"field 'preference' is {value!r}; expected 'chosen' or 'rejected'")
            is_desirable = value == "chosen"
        else:
            is_desirable, name = row.require("label", bool, "true or false"), "completion"
        question = rows.asked(row)
        prompt = rows.prompt(row, "prompt") if question is None else question
        return JudgedRow(prompt=prompt, answer=rows.answer(row, name), is_desirable=is_desirable)

    def related(self, rows: Iterator[ReadRow]) -> Iterator[tuple[ReadRow, Any]]:
        """Each row with the answer of the next row that has another prompt."""
        read = list(rows)
        judged: list[JudgedRow] = [each.row for each in read]
        if len({row.prompt for row in judged}) < 2:
            error = RowError(
                "KTO needs rows of two prompts or more: its baseline is of answers to other prompts"
            )
            yield from ((each, error) for each in read)
            return
        after = 0
        for place, row in enumerate(judged):
            after = max(after, place + 1)
            while judged[after % len(judged)].prompt == row.prompt:
                after += 1
            yield read[place], replace(row, other=judged[after % len(judged)].answer)

    def sample(self, row: JudgedRow, encoder: Encoder) -> Sample:
        segments = (encoder.answer(row.prompt, row.answer), encoder.answer(row.prompt, row.other))
        return Sample(segments, (float(row.is_desirable),))

    def findings(self, row: JudgedRow, sample: Sample, encoder: Encoder) -> Iterator[tuple[str, str]]:
        yield from never_stops(sample, encoder)
        yield from merging(row.prompt, [row.answer], encoder)

    def numbers(self, row: JudgedRow) -> Mapping[str, float]:
        turns = {} if isinstance(row.prompt, str) else {"turns": float(len(row.prompt) + 1)}
        return turns | {"desirable": float(row.is_desirable)}


# ---- the objective


def reference_logprobs(row: PackedRow, scores: Tensor) -> Tensor:
    """Reference log-probability of each segment, (S,)."""
    values = [value for sample in row.samples for value in sample.reference]
    assert len(values) == row.num_segments, "reference log-probabilities are computed before training"
    return torch.tensor(values, dtype=scores.dtype, device=scores.device)


def sample_labels(row: PackedRow, scores: Tensor) -> Tensor:
    return torch.tensor([sample.labels for sample in row.samples], dtype=scores.dtype, device=scores.device)


@dataclass(frozen=True)
class JudgedObjective(Objective):
    """KTO. Samples are (own answer, another row's answer to the same prompt); the label is 1 or 0.

    The second segment only serves the baseline z0, which belongs to the whole step.
    """

    settings: PreferenceSection
    baseline: float = 0.0

    def count(self, row: PackedRow) -> float:
        return float(len(row.samples))

    def _log_ratios(self, scores: Tensor, row: PackedRow) -> tuple[Tensor, Tensor]:
        policy_B2 = segment_logprobs(scores, row).view(len(row.samples), 2)
        reference_B2 = reference_logprobs(row, scores).view(len(row.samples), 2)
        if self.settings.average_logprobs:
            counts_B2 = trained_counts(row).view(len(row.samples), 2).clamp(min=1).to(scores.dtype)
            policy_B2, reference_B2 = policy_B2 / counts_B2, reference_B2 / counts_B2
        return policy_B2, reference_B2

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        policy_B2, reference_B2 = self._log_ratios(scores, row)
        is_desirable_B = sample_labels(row, scores).view(-1) > 0.5
        settings = self.settings
        loss = losses.kto(
            policy_B2[:, 0],
            reference_B2[:, 0],
            is_desirable_B,
            kl_baseline=self.baseline,
            beta=settings.beta,
            desirable_weight=settings.desirable_weight,
            undesirable_weight=settings.undesirable_weight,
        )
        with torch.no_grad():
            reward_B = settings.beta * (policy_B2[:, 0] - reference_B2[:, 0])
            good, bad = reward_B[is_desirable_B], reward_B[~is_desirable_B]
            totals = {
                "desirable_reward": (float(good.sum()), float(len(good))),
                "undesirable_reward": (float(bad.sum()), float(len(bad))),
                "kl_baseline": (self.baseline * len(row.samples), float(len(row.samples))),
            }
        return Terms(SumCount(settings.preference_weight * loss.sum, loss.count), totals)

    def prepare(self, rows: Sequence[PackedRow], score: Score, add_up: AddUp) -> Objective:
        total = num = 0.0
        for row in rows:
            policy_B2, reference_B2 = self._log_ratios(score(row), row)
            total += float((policy_B2 - reference_B2)[:, 1].sum())
            num += len(row.samples)
        total, num = add_up([total, num])
        return replace(self, baseline=max(0.0, total / num) if num else 0.0)
