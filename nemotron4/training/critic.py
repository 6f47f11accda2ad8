"""PPO's value model: a decoder of its own with one output, from a reward model or from the policy's start."""

from __future__ import annotations

import torch
from torch import nn

from nemotron4.checkpoint import open_checkpoint
from nemotron4.checkpoint.interface import Checkpoint
from nemotron4.checkpoint.load import load_weights
from nemotron4.errors import ConfigError
from nemotron4.model.attention import RotaryEmbedding
from nemotron4.model.config import ModelConfig
from nemotron4.model.reward_head import ATTRIBUTE_NAMES, CARD_WEIGHTS, RewardModel
from nemotron4.training.policy_scorer import ValueScorer
from nemotron4.training.recipe import Recipe

NOT_LOADED = "a critic has one output of its own"


def build_critic(recipe: Recipe, policy_base: Checkpoint, policy: ModelConfig) -> ValueScorer:
    """The critic that the recipe names. From a reward model it starts as the card's weighted sum of its
    attributes; from a language model its output starts at zero.
    """
    assert recipe.policy_gradient is not None, "only PPO has a critic"
    start = recipe.policy_gradient.critic.start
    base = policy_base if start is None else open_checkpoint(start)
    num_outputs = base.config.num_reward_attributes
    if base.config.vocab_size != policy.vocab_size:
        raise ConfigError(
            f"the critic has a vocabulary of {base.config.vocab_size}, the policy one of {policy.vocab_size}",
            hint="start both from models with one tokenizer",
        )
    config = ModelConfig(**{**base.config.__dict__, "num_reward_attributes": num_outputs or 1})
    with torch.device("meta"):
        net = RewardModel(config)
    skip = {}
    if not num_outputs:
        skip = dict.fromkeys(("reward_head.weight", "reward_head.bias"), NOT_LOADED)
        if "lm_head.weight" in base.tensors:
            skip["lm_head.weight"] = NOT_LOADED
    load_weights(net, base, dtype=torch.float32, skip=skip)
    net.model.rotary = RotaryEmbedding(config)
    net.reward_head = _value_head(net, num_outputs)
    return ValueScorer(net)


@torch.no_grad()
def _value_head(net: RewardModel, num_outputs: int) -> nn.Linear:
    head = nn.Linear(net.config.hidden_size, 1, dtype=torch.float32)
    head.weight.zero_()
    head.bias.zero_()
    if num_outputs:
        if num_outputs != len(ATTRIBUTE_NAMES):
            raise ConfigError(
                f"the critic's reward model has {num_outputs} outputs; expected {len(ATTRIBUTE_NAMES)}"
            )
        weights_A = torch.tensor([CARD_WEIGHTS.get(name, 0.0) for name in ATTRIBUTE_NAMES])
        head.weight.copy_(weights_A[None] @ net.reward_head.weight)
        head.bias.copy_(weights_A @ net.reward_head.bias[:, None])
    return head
