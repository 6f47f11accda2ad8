"""Policy-gradient training on prompts: their answers are generated and judged by what the caller hands in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from nemotron4.errors import ConfigError
from nemotron4.training import prompts
from nemotron4.training.encoding import RowKind
from nemotron4.training.prompts import PromptKind
from nemotron4.training.rollout_settings import PolicyGradientSection
from nemotron4.training.stage import Objective, Stage

if TYPE_CHECKING:
    from nemotron4.model.reward_head import RewardModel
    from nemotron4.model.transformer import Transformer
    from nemotron4.training.scorer import Scorer

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
        from nemotron4.training.policy import ActorObjective

        return ActorObjective(settings)

    def scorer(self, net: Transformer | RewardModel, settings: PolicyGradientSection) -> Scorer:
        from nemotron4.model.transformer import Transformer
        from nemotron4.training.scorer import PolicyScorer

        assert isinstance(net, Transformer), "a policy is a language model"
        return PolicyScorer(net, temperature=settings.temperature)

    def rollouts(self, settings: PolicyGradientSection) -> PolicyGradientSection:
        return settings

    def trainer(self, settings: PolicyGradientSection) -> Any:
        from nemotron4.training.policy_trainer import policy_trainer

        return policy_trainer


STAGE = PolicyGradientStage()
