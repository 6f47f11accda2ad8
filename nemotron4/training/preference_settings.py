"""The table of preference training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemotron4.errors import ConfigError
from nemotron4.training.rollout_settings import RolloutSection

READ_BY = {"eta": "rpo", "distance": "rpo", "desirable_weight": "kto", "undesirable_weight": "kto"}


@dataclass(frozen=True, kw_only=True)
class PreferenceSection:
    """``loss`` rpo is Reward-aware Preference Optimization (arXiv 2406.11704), not TRL's former rpo_alpha."""

    loss: Literal["dpo", "ipo", "rpo", "kto"]
    beta: float = 0.1
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

    @property
    def notes(self) -> list[str]:
        """What is set and not read: a recipe for rpo is also one for dpo, with another loss."""
        return [
            f"preference.{name} is ignored: loss {loss} reads it, {self.loss} does not"
            for name, loss in READ_BY.items()
            if loss != self.loss and getattr(self, name) != getattr(PreferenceSection, name)
        ]
