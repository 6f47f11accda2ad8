"""Policy-gradient training on prompts: their answers are generated and judged by what the caller hands in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch

from nemotron4.errors import ConfigError
from nemotron4.model.reward_head import RewardModel
from nemotron4.model.transformer import Transformer
from nemotron4.training import parallel, prompts
from nemotron4.training.encoding import RowKind
from nemotron4.training.loading import Origin, build_critic
from nemotron4.training.policy import ActorObjective, PolicyGradientSection
from nemotron4.training.policy_trainer import PolicyTrainer
from nemotron4.training.prompts import PromptKind
from nemotron4.training.reference import model_hash
from nemotron4.training.rollouts import Connect
from nemotron4.training.scorer import PolicyScorer, Scorer
from nemotron4.training.sharded import Grid
from nemotron4.training.stage import Objective, Stage

GSM8K = [{"kind": "gsm8k"}]
# Published methods as settings: docs/training.md has their equations.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": "grpo"},
    "ppo": {"algorithm": "ppo"},
    "reinforce": {"algorithm": "reinforce"},
    "dapo": {"algorithm": "grpo", "clip_high": 0.28, "kl_coefficient": 0.0, "max_resamples": 4},
    "dr_grpo": {"algorithm": "grpo", "advantage": "centred", "loss_over": "sums", "kl_coefficient": 0.0},
    "gspo": {
        "algorithm": "grpo",
        "ratio": "sequence",
        "loss_over": "answers",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "kl_coefficient": 0.0,
    },
    "rloo": {"algorithm": "reinforce", "loss_over": "sums", "kl_over": "sums", "absolute_kl": False},
    "reinforce_plus_plus_baseline": {"algorithm": "grpo", "advantage": "batch", "kl_estimator": "k2"},
}


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


class PolicyGradientStage(Stage):
    name = "policy-gradient"
    section = PolicyGradientSection
    needed = "algorithm and rewards"
    kinds = (PromptKind(),)
    examples: ClassVar = {name: {**settings, "rewards": GSM8K} for name, settings in METHODS.items()}

    def check(self, recipe: Any) -> None:
        settings: PolicyGradientSection = recipe.settings
        prompts.check_rollouts(recipe, settings)
        if recipe.adapter is not None and recipe.adapter.modules_to_save and settings.kl_coefficient:
            raise ConfigError(
                "adapter.modules_to_save changes what the KL is measured from",
                hint="set policy_gradient.kl_coefficient = 0, or leave modules_to_save out",
            )

    def named(self, table: dict[str, Any], reward_model: str | None) -> dict[str, Any]:
        return prompts.with_reward_model(table, reward_model)

    def kind(self, settings: PolicyGradientSection) -> RowKind:
        return prompts.prompt_kind(settings)

    def objective(self, settings: PolicyGradientSection) -> Objective:
        return ActorObjective(settings)

    def scorer(self, net: Transformer | RewardModel, settings: PolicyGradientSection) -> Scorer:
        assert isinstance(net, Transformer), "a policy is a language model"
        return PolicyScorer(net, temperature=settings.temperature)

    def rollouts(self, settings: PolicyGradientSection) -> PolicyGradientSection:
        return settings

    def trainer(self, settings: PolicyGradientSection) -> Any:
        return policy_trainer


STAGE = PolicyGradientStage()
