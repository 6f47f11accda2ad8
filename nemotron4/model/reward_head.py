"""The reward model: a decoder with a linear map to attributes in place of the output layer.

Shape suffixes: B = sequences, T = positions, S = read-outs, D = hidden size, A = attributes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nemotron4.errors import ConfigError
from nemotron4.model.config import ModelConfig
from nemotron4.model.transformer import Decoder

NUM_ATTRIBUTES = 9
# The order of the published head's outputs; the first four are neither trained nor used.
ATTRIBUTE_NAMES = (
    "quality", "toxicity", "humor", "creativity",
    "helpfulness", "correctness", "coherence", "complexity", "verbosity",
)  # fmt: skip
# What each attribute weighs in the scalar, from the model card of Nemotron-4-340B-Reward.
CARD_WEIGHTS = {
    "helpfulness": 0.3,
    "correctness": 0.74,
    "coherence": 0.46,
    "complexity": 0.47,
    "verbosity": -0.33,
}


class RewardModel(nn.Module):
    """Decoder plus one linear layer with bias, read at the last token of a conversation (NeMo-Aligner).

    The head is float32 whatever the decoder's type. Scores are unbounded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.num_reward_attributes < 1:
            raise ConfigError(
                f"num_reward_attributes is {config.num_reward_attributes}; a reward model needs 1 or more"
            )
        self.config = config
        self.model = Decoder(config)
        self.reward_head = nn.Linear(
            config.hidden_size, config.num_reward_attributes, bias=True, dtype=torch.float32
        )

    def forward(self, hidden_SD: Tensor) -> Tensor:
        """Hidden states (after the final norm) at the read-out tokens -> scores (S, A), float32."""
        scores_SA: Tensor = self.reward_head(hidden_SD.float())
        return scores_SA


def fresh_head(config: ModelConfig, *, seed: int) -> tuple[Tensor, Tensor]:
    """A small normal weight (A, D) and a zero bias (A,)."""
    generator = torch.Generator().manual_seed(seed)
    weight_AD = torch.empty(config.num_reward_attributes, config.hidden_size)
    weight_AD.normal_(0.0, config.init_std, generator=generator)
    return weight_AD, torch.zeros(config.num_reward_attributes)
