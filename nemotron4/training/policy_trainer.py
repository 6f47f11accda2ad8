"""Policy gradients: from judged answers to advantages, and PPO's critic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nemotron4.training import checkpoints, parallel
from nemotron4.training.advantages import (
    Row,
    actor_critic_advantages,
    advantages_of_group,
    normalised,
    token_kl,
)
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.judged import Judged, groups_of, has_one_reward, reward_of
from nemotron4.training.loading import Origin, build_critic
from nemotron4.training.metrics import METRICS_FILE
from nemotron4.training.optimizer import apply_gradients, build_optimizer, finite_norm
from nemotron4.training.policy import AnswerSample, CriticObjective
from nemotron4.training.reference import model_hash
from nemotron4.training.rollout_settings import PolicyGradientSection
from nemotron4.training.rollout_trainer import RolloutTrainer
from nemotron4.training.rollouts import Connect
from nemotron4.training.samples import Sample
from nemotron4.training.schedule import learning_rate
from nemotron4.training.sharded import Grid


class PolicyTrainer(RolloutTrainer):
    """Take ``critic`` for PPO: an engine on a value model."""

    def __init__(self, *arguments: Any, critic: TrainingEngine | None, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.policy: PolicyGradientSection = self.recipe.settings
        self.critic = critic
        self.critic_objective = CriticObjective(self.policy.critic)
        self.critic_settings = replace(
            self.rates,
            learning_rate=self.policy.critic.learning_rate,
            min_learning_rate=0.0,
        )
        self.critic_optimizer: torch.optim.Optimizer | None = None
        self._critic_losses: list[float] = []
        if critic is not None:
            self.critic_optimizer = build_optimizer(critic.trainable, self.critic_settings)

    # ---- advantages

    def _samples(self, answers: Sequence[Judged]) -> list[AnswerSample]:
        """Samples with their advantages, without the groups that say nothing."""
        if self.policy.algorithm == "ppo":
            return self._with_critic(answers) if answers else []
        samples: list[AnswerSample] = []
        advantages: list[float] = []
        for group in groups_of(answers):
            found = advantages_of_group(
                [self._penalised(answer) for answer in group], self.policy.advantage_kind
            )
            if found is not None and any(found):
                samples += [answer.sample for answer in group]
                advantages += found
        if self.policy.advantage_kind == "batch" and samples:
            advantages = normalised(advantages, [len(sample.logprobs) for sample in samples])
        return [
            replace(sample, advantages=(advantage,) * len(sample.logprobs))
            for sample, advantage in zip(samples, advantages, strict=True)
        ]

    def _penalised(self, answer: Judged) -> float:
        """The reward; for REINFORCE less the coefficient times the answer's KL."""
        if self.policy.algorithm != "reinforce" or not self.policy.kl_coefficient:
            return reward_of(answer)
        kl = self._kl(answer.sample)
        length = len(kl) if self.policy.kl_over == "tokens" else 1
        return reward_of(answer) - self.policy.kl_coefficient * sum(kl) / length

    def _kl(self, sample: AnswerSample) -> Row:
        return token_kl(sample.logprobs, sample.reference_logprobs, is_absolute=self.policy.absolute_kl)

    def _with_critic(self, answers: Sequence[Judged]) -> list[AnswerSample]:
        """PPO: the KL is paid at each token, the reward comes with the last one."""
        settings = self.policy
        rewards: list[Row] = []
        for answer in answers:
            paid = [0.0] * len(answer.sample.logprobs)
            if settings.kl_coefficient:
                paid = [-settings.kl_coefficient * kl for kl in self._kl(answer.sample)]
            paid[-1] += reward_of(answer)
            rewards.append(tuple(paid))
        advantages, returns = actor_critic_advantages(
            rewards,
            [answer.sample.values for answer in answers],
            discount=settings.discount,
            decay=settings.gae_decay,
            is_normalised=settings.normalise_advantages,
        )
        return [
            replace(answer.sample, advantages=advantages[i], returns=returns[i])
            for i, answer in enumerate(answers)
        ]

    # ---- the critic

    def _why_nothing_learnt(self) -> str:
        """A critic's errors make updates of equal rewards too, which say nothing of the answers."""
        reason = super()._why_nothing_learnt()
        if self.critic is None or reason:
            return reason
        is_constant = self.is_writer and has_one_reward(self.folder / METRICS_FILE)
        return f"in all {self._step} steps every answer had the same reward" * self.engine.any_process(
            is_constant
        )

    def _values(self, samples: Sequence[AnswerSample]) -> list[Row]:
        return super()._values(samples) if self.critic is None else self._token_scores(self.critic, samples)

    def _learn(self, samples: Sequence[Sample]) -> dict[str, float]:
        self._critic_losses.clear()
        metrics = super()._learn(samples)
        if self._critic_losses:
            metrics["critic_loss"] = sum(self._critic_losses) / len(self._critic_losses)
        return metrics

    def _updated(self, part: Sequence[Sample]) -> None:
        if self.critic is None or self.critic_optimizer is None:
            return
        rows = self.critic.rows(part, self.recipe.batch.row_tokens)
        result = self.critic.forward_backward(rows, self.critic_objective)
        rate = learning_rate(self._step, self.plan.num_scheduled, self.critic_settings)
        norm = finite_norm(self.critic, self._step + 1, "critic's gradient")
        apply_gradients(self.critic, self.critic_optimizer, norm, rate, self.recipe.optimizer.clip_norm)
        self._critic_losses.append(result.loss)

    def tensors(self) -> dict[str, torch.Tensor]:
        tensors = super().tensors()
        if self.critic is not None and self.critic_optimizer is not None:
            critic = checkpoints.plain_tensors(self.critic.trainable, self.critic_optimizer)
            tensors |= {f"critic.{name}": tensor for name, tensor in critic.items()}
        return tensors


def policy_trainer(
    origin: Origin,
    grid: Grid | None,
    device: torch.device,
    connect: Connect,
) -> Callable[..., PolicyTrainer]:
    """A trainer with judges, and with the reference and critic that the recipe asks for."""
    recipe, base = origin.recipe, origin.base
    settings: PolicyGradientSection = recipe.settings
    reference = None
    if settings.kl_coefficient and recipe.adapter is None:
        reference = parallel.build(origin, grid, device, is_frozen=True)
    backend = connect(recipe, base)
    identity = [backend.judge.identity]
    critic = None
    if settings.has_critic:
        scorer = build_critic(recipe, base, origin.config)
        identity.append(model_hash(scorer.net))
        critic = parallel.distribute(scorer.to(device), grid, device, compute=origin.compute)
    return partial(
        PolicyTrainer,
        backend=backend,
        identity=identity,
        skeleton=origin.policy,
        reference=reference,
        critic=critic,
    )
