"""The decoder: a Nemotron-4 block or, by configuration, a Llama block. State dict in Hugging Face names.

Shape suffixes: B = sequences, T = positions, V = vocabulary, D = hidden size; ``...`` = any leading dims.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from nemotron4.model.attention import Attend, Attention, CausalAttend, RotaryEmbedding, Rotation
from nemotron4.model.config import ModelConfig
from nemotron4.model.layers import LayerNorm1P, RMSNorm, build_mlp, build_norm


class Block(nn.Module):
    """``h = x + Attn(Norm(x)); h + MLP(Norm(h))``."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = build_mlp(config)

    def forward(self, x: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        h = x + self.self_attn(self.input_layernorm(x), rotation, attend)
        out: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return out

    def set_part(self, name: str, part: nn.Module) -> None:
        """Put another module in place of a norm or of the feed-forward block."""
        assert name in self._modules, name
        self._modules[name] = part


class Decoder(nn.Module):
    """Tokens to the hidden states after the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = build_norm(config)
        self.rotary = RotaryEmbedding(config)

    def blocks(self) -> Iterator[Block]:
        return iter(cast("Iterable[Block]", self.layers))

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(...) token ids and their positions -> (..., D)."""
        x: Tensor = self.embed_tokens(tokens)
        rotation = self.rotary(positions, x.dtype)
        for block in self.blocks():
            x = block(x, rotation, attend)
        out: Tensor = self.norm(x)
        return out


class Transformer(nn.Module):
    """A whole language model on one device.

    ``Transformer(config)(tokens_BT) -> logits_BTV`` in float32. How it is split over devices is declared
    elsewhere and applied from outside; how keys and values are kept is the ``attend`` of the caller.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> Tensor:
        hidden_BTD = self.hidden(tokens_BT, positions_BT=positions_BT, segments_BT=segments_BT)
        return self.logits(hidden_BTD)

    def hidden(
        self, tokens_BT: Tensor, *, positions_BT: Tensor | None = None, segments_BT: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, (B, T, D), by one full causal pass without a cache.

        Positions count from 0 in each row unless given. With ``segments_BT`` a position sees only its own
        segment: packed documents and padding need it.
        """
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        out: Tensor = self.model(tokens_BT, positions_BT, CausalAttend(segments_BT))
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V), float32."""
        out: Tensor = self.lm_head(hidden)
        return out.float()

    def set_output_layer(self, layer: nn.Module) -> None:
        """Put another linear map from hidden states to logits in place of ``lm_head``."""
        self._modules["lm_head"] = layer

    @torch.no_grad()
    def initialise(self, *, seed: int) -> None:
        """Fresh weights: normal with ``init_std``, output projections with that / sqrt(2 * layers)."""
        for name, weight in self.fresh_weights(seed=seed):
            self.get_parameter(name).copy_(weight)

    def fresh_weights(self, *, seed: int) -> Iterator[tuple[str, Tensor]]:
        """What ``initialise`` gives each parameter, one after the other; float32, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        std = self.config.init_std
        scaled_std = std / math.sqrt(2 * self.config.num_layers)
        is_tied = self.lm_head.weight is self.model.embed_tokens.weight
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                is_output = name.endswith(("o_proj", "down_proj"))
                values = torch.empty(module.weight.shape)
                values.normal_(0.0, scaled_std if is_output else std, generator=generator)
                if is_tied and module is self.lm_head:
                    yield "model.embed_tokens.weight", values
                elif not (is_tied and module is self.model.embed_tokens):
                    yield f"{name}.weight", values
            if isinstance(module, nn.Linear) and module.bias is not None:
                yield f"{name}.bias", torch.zeros(module.bias.shape)
            if isinstance(module, LayerNorm1P | RMSNorm):
                for kind, parameter in module.named_parameters():
                    is_factor = isinstance(module, RMSNorm)
                    yield f"{name}.{kind}", torch.full(parameter.shape, float(is_factor))
