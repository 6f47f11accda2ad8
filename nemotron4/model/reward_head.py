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

    @torch.no_grad()
    def initialise_head(self, *, seed: int) -> None:
        """A small normal weight and a zero bias: a fresh head on a trained decoder."""
        generator = torch.Generator(device=self.reward_head.weight.device).manual_seed(seed)
        self.reward_head.weight.normal_(0.0, self.config.init_std, generator=generator)
        self.reward_head.bias.zero_()
