"""Policy gradients: the table of their settings, and their objectives on answers that were judged before.

Legend: P predicted tokens (here: tokens of answers), B answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nemotron4.errors import ConfigError
from nemotron4.training import losses
from nemotron4.training.losses import Row, SumCount
from nemotron4.training.packing import PackedRow, Sample
from nemotron4.training.stage import Objective, Terms

RewardKind = Literal["reward_model", "http", "gsm8k", "boxed", "pattern", "instructions"]
# What each kind of judge cannot do without, and the only thing it takes with weight and shift.
NEEDED_SETTING = {"reward_model": "model", "http": "url", "pattern": "pattern"}
PREVIOUS = "previous"  # in a chain: the last reward model before this stage


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """One judge of answers. With several, the reward is the sum of ``weight * (value - shift)``.

    gsm8k and boxed compare with the prompt row's field ``answer_field``; instructions reads the row's
    ``instruction_id_list`` and ``kwargs``, as IFEval has them; pattern is a regular expression that the
    whole answer must match.
    """

    kind: RewardKind
    weight: float = 1.0
    shift: float = 0.0
    model: str | None = None
    url: str | None = None
    api_key_env: str | None = None  # http: the environment variable that holds the key
    attribute: str = "scalar"  # reward_model and http: the weighted sum, or one attribute's name
    pattern: str | None = None
    answer_field: str = "answer"

    def __post_init__(self) -> None:
        needed = NEEDED_SETTING.get(self.kind)
        for name in sorted(set(NEEDED_SETTING.values())):
            if (getattr(self, name) is None) == (name == needed):
                problem = "is missing" if name == needed else "has no meaning"
                raise ConfigError(f"reward of kind {self.kind!r}: {name} {problem}")
        if self.weight == 0:
            raise ConfigError(f"reward of kind {self.kind!r}: weight is 0, so it would judge nothing")

    @property
    def row_fields(self) -> tuple[str, ...]:
        """Fields that every prompt row must have."""
        if self.kind in ("gsm8k", "boxed"):
            return (self.answer_field,)
        return ("instruction_id_list", "kwargs") if self.kind == "instructions" else ()

    @property
    def needs_messages(self) -> bool:
        """True for judges that read a conversation: a prompt given as rendered text has none."""
        return self.kind in ("reward_model", "http")


@dataclass(frozen=True, kw_only=True)
class CriticSection:
    """PPO's value model: a decoder with one output per token, trained with the policy."""

    start: str | None = None  # a reward model or a language model; None: model.start
    learning_rate: float = 9e-6
    value_clip: float = 0.2


@dataclass(frozen=True, kw_only=True)
class PolicyGradientSection:
    """One step: answers to ``num_prompts`` prompts, rewards, then updates of ``batch.global_size`` answers.

    reinforce has NeMo-Aligner's leave-one-out baseline, and its KL is part of the reward, as in ppo; in grpo
    it is a term of the loss (k3). The defaults are NeMo-Aligner's where it has the setting.
    """

    algorithm: Literal["ppo", "reinforce", "grpo"]
    rewards: tuple[RewardSource, ...]
    num_prompts: int = 64
    group_size: int = 8  # answers to each prompt
    max_new_tokens: int = 256
    temperature: float = 1.0
    unfinished: Literal["leave_out", "judge"] = "leave_out"  # answers that reach max_new_tokens
    kl_coefficient: float = 0.01
    absolute_kl: bool = True  # ppo, reinforce: |log-ratio| of each token instead of the log-ratio
    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_bonus: float = 0.0
    inner_epochs: int = 1  # how often a step's answers are gone through
    discount: float = 1.0  # ppo, as the next two
    gae_decay: float = 0.95
    normalise_advantages: bool = True
    critic: CriticSection = field(default_factory=CriticSection)

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("policy_gradient.rewards names no judge")
        smallest = 1 if self.algorithm == "ppo" else 2
        if self.group_size < smallest:
            raise ConfigError(
                f"policy_gradient.group_size is {self.group_size}; {self.algorithm} needs {smallest} or more"
            )
        for name in ("num_prompts", "max_new_tokens", "inner_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"policy_gradient.{name} is {getattr(self, name)}; expected 1 or more")
        if self.temperature <= 0:
            raise ConfigError(
                f"policy_gradient.temperature is {self.temperature}; expected more than 0",
                hint="greedy answers to one prompt are all equal",
            )
        for name in ("kl_coefficient", "clip_low", "clip_high", "entropy_bonus"):
            if getattr(self, name) < 0:
                raise ConfigError(f"policy_gradient.{name} is {getattr(self, name)}; expected 0 or more")

    @property
    def has_critic(self) -> bool:
        return self.algorithm == "ppo"


# ---- the objectives


@dataclass(frozen=True)
class AnswerSample(Sample):
    """Prompt and answer in one segment, and one number for each token of the answer in each field."""

    logprobs: Row = ()  # under the policy that wrote it
    reference_logprobs: Row = ()  # empty without a reference
    advantages: Row = ()
    values: Row = ()  # the critic's, before the step
    returns: Row = ()


def _tokens(row: PackedRow, like: Tensor, numbers: Callable[[AnswerSample], Row]) -> Tensor:
    """One field of all answers of the row, (P,)."""
    found: list[float] = []
    for sample in row.samples:
        assert isinstance(sample, AnswerSample), "policy-gradient stages train on judged answers"
        found.extend(numbers(sample))
    assert len(found) == len(row.target_P), "one number for each token of each answer"
    return torch.tensor(found, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class ActorObjective(Objective):
    """The policy's loss: PPO's or GRPO's clipped surrogate, or REINFORCE; the divisor is the answers' tokens.

    Scores are (P, 2): log-probability and entropy of each token's distribution, at the rollouts' temperature.
    """

    settings: PolicyGradientSection

    def count(self, row: PackedRow) -> float:
        return float(len(row.target_P))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        logprobs_P, entropy_P = scores[:, 0], scores[:, 1]
        old_P = _tokens(row, scores, lambda sample: sample.logprobs)
        advantages_P = _tokens(row, scores, lambda sample: sample.advantages)
        loss = self._loss(logprobs_P, old_P, advantages_P, row)
        total = loss.sum
        if self.settings.entropy_bonus:
            total = total - self.settings.entropy_bonus * entropy_P.sum()
        with torch.no_grad():
            ratio_P = (logprobs_P - old_P).exp()
            clipped_P = (ratio_P > 1 + self.settings.clip_high) & (advantages_P > 0)
            clipped_P |= (ratio_P < 1 - self.settings.clip_low) & (advantages_P < 0)
            num = float(len(ratio_P))
            totals = {
                "clip_fraction": (float(clipped_P.sum()), num),
                "ratio": (float(ratio_P.sum()), num),
                "entropy": (float(entropy_P.sum()), num),
            }
        return Terms(SumCount(total, loss.count), totals)

    def _loss(self, logprobs_P: Tensor, old_P: Tensor, advantages_P: Tensor, row: PackedRow) -> SumCount:
        settings = self.settings
        # To the losses every token is a row of one: advantages are per token already.
        mask_P1 = torch.ones_like(logprobs_P, dtype=torch.bool)[:, None]
        now_P1, old_P1 = logprobs_P[:, None], old_P[:, None]
        if settings.algorithm == "reinforce":
            return losses.reinforce(now_P1, advantages_P, mask_P1)
        clip = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
        if settings.algorithm == "ppo":
            return losses.ppo_actor(now_P1, old_P1, advantages_P[:, None], mask_P1, **clip)
        reference_P1 = None
        if settings.kl_coefficient:
            reference_P1 = _tokens(row, logprobs_P, lambda sample: sample.reference_logprobs)[:, None]
        return losses.grpo(
            now_P1,
            old_P1,
            advantages_P,
            mask_P1,
            reference_logprobs_BT=reference_P1,
            kl_coefficient=settings.kl_coefficient,
            **clip,
        )


@dataclass(frozen=True)
class CriticObjective(Objective):
    """PPO's value loss; scores are one value for each token of the answers, (P,)."""

    settings: CriticSection

    def count(self, row: PackedRow) -> float:
        return float(len(row.target_P))

    def terms(self, scores: Tensor, row: PackedRow) -> Terms:
        old_P = _tokens(row, scores, lambda sample: sample.values)
        returns_P = _tokens(row, scores, lambda sample: sample.returns)
        mask_P1 = torch.ones_like(scores, dtype=torch.bool)[:, None]
        loss = losses.ppo_critic(
            scores[:, None], old_P[:, None], returns_P[:, None], mask_P1, clip=self.settings.value_clip
        )
        return Terms(loss)
