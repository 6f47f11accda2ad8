"""Names and shapes without torch, against the module that has them."""

from __future__ import annotations

import itertools

import pytest
import torch

from nemotron4.model.config import ModelConfig
from nemotron4.model.shapes import weight_shapes
from nemotron4.model.transformer import Transformer


@pytest.mark.parametrize(
    ("norm", "mlp", "is_tied", "has_bias"),
    list(itertools.product(("layernorm1p", "rmsnorm"), ("relu2", "swiglu"), (False, True), (False, True))),
)
def test_shapes_are_those_of_the_state_dict(norm: str, mlp: str, is_tied: bool, has_bias: bool) -> None:
    config = ModelConfig(
        num_layers=2, hidden_size=12, ffn_hidden_size=20, num_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=30, norm=norm, mlp=mlp, tie_embeddings=is_tied, attention_bias=has_bias,
    )  # fmt: skip
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    assert list(weight_shapes(config).items()) == [(name, tuple(t.shape)) for name, t in state.items()]
