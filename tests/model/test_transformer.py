"""The decoder against transformers on the same random weights, and against its own published sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, NemotronForCausalLM

from nemotron4.errors import ConfigError
from nemotron4.model.config import ModelConfig, RopeScaling, weight_shapes
from nemotron4.model.presets import PRESETS
from nemotron4.model.transformer import Transformer
from tests.peers import llama_config, nemotron_config

NEMOTRON = ModelConfig(
    num_layers=2, hidden_size=48, ffn_hidden_size=80, num_heads=6, num_kv_heads=2, head_dim=16, vocab_size=97
)
LLAMA = ModelConfig(
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=80,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=97,
    norm="rmsnorm",
    mlp="swiglu",
    rotary_fraction=1.0,
    tie_embeddings=True,
)


def _randomised(peer: torch.nn.Module) -> None:
    """Weights far from their initial values, so that a forgotten bias or a wrong +1 shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)


def nemotron_peer(config: ModelConfig) -> NemotronForCausalLM:
    peer = NemotronForCausalLM(nemotron_config(config)).eval()
    _randomised(peer)
    return peer


def llama_peer(config: ModelConfig) -> LlamaForCausalLM:
    peer = LlamaForCausalLM(llama_config(config)).eval()
    _randomised(peer)
    return peer


PAIRS: list[tuple[ModelConfig, Callable[[ModelConfig], torch.nn.Module]]] = [
    (NEMOTRON, nemotron_peer),
    (LLAMA, llama_peer),
]


def with_weights_of(peer: torch.nn.Module, config: ModelConfig) -> Transformer:
    model = Transformer(config).eval()
    model.load_state_dict(peer.state_dict(), strict=True)
    return model


@pytest.mark.parametrize(("config", "build_peer"), PAIRS, ids=["nemotron", "llama"])
def test_logits_equal_transformers(
    config: ModelConfig, build_peer: Callable[[ModelConfig], torch.nn.Module]
) -> None:
    peer = build_peer(config)
    tokens_BT = torch.randint(0, config.vocab_size, (3, 29), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected_BTV = peer(tokens_BT).logits
        actual_BTV = with_weights_of(peer, config)(tokens_BT)
    torch.testing.assert_close(actual_BTV, expected_BTV, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("config", "build_peer"), PAIRS, ids=["nemotron", "llama"])
def test_padded_rows_equal_transformers(
    config: ModelConfig, build_peer: Callable[[ModelConfig], torch.nn.Module], side: str
) -> None:
    peer = build_peer(config)
    lengths = [11, 4, 7]
    tokens_BT = torch.randint(0, config.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    column_T = torch.arange(11)
    real_BT = torch.stack([column_T >= 11 - n if side == "left" else column_T < n for n in lengths])
    positions_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected_BTV = peer(tokens_BT, attention_mask=real_BT.long(), position_ids=positions_BT).logits
        actual_BTV = with_weights_of(peer, config)(
            tokens_BT, positions_BT=positions_BT, segments_BT=real_BT.long()
        )
    torch.testing.assert_close(actual_BTV[real_BT], expected_BTV[real_BT], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="linear", factor=4.0),
        RopeScaling(kind="llama3", factor=8.0, original_context_length=64),
    ],
    ids=["linear", "llama3"],
)
def test_scaled_rope_equals_transformers(scaling: RopeScaling) -> None:
    config = ModelConfig(**{**LLAMA.__dict__, "rope_scaling": scaling, "rope_theta": 500000.0})
    peer = llama_peer(config)
    tokens_BT = torch.randint(0, config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            with_weights_of(peer, config)(tokens_BT), peer(tokens_BT).logits, atol=1e-4, rtol=1e-4
        )


def test_packed_rows_equal_separate_rows() -> None:
    model = Transformer(NEMOTRON).eval()
    model.initialise(seed=0)
    first, second = torch.randint(0, 97, (1, 5)), torch.randint(0, 97, (1, 8))
    packed = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(5), torch.arange(8)))[None]
    segments = torch.tensor([[0] * 5 + [1] * 8])
    with torch.no_grad():
        together = model(packed, positions_BT=positions, segments_BT=segments)
        apart = torch.cat((model(first), model(second)), dim=1)
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("nemotron4-340b", 341_029_195_776),
        ("nemotron4-15b", 15_628_775_424),
        ("minitron-8b", 8_271_699_968),
        ("minitron-4b", 4_190_509_056),
    ],
)
def test_presets_have_the_published_size(preset: str, count: int) -> None:
    config = PRESETS[preset]()
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert config.num_parameters == count


def test_nano_counts_by_formula_and_by_module() -> None:
    for config in (PRESETS["nano"](), LLAMA):
        module_count = sum(parameter.numel() for parameter in Transformer(config).parameters())
        assert config.num_parameters == module_count


def test_a_340b_token_needs_the_published_cache() -> None:
    assert PRESETS["nemotron4-340b"]().kv_bytes_per_token(2) == 589_824


def test_squared_relu_passes_no_gradient_where_negative() -> None:
    mlp = Transformer(NEMOTRON).model.layers[0].mlp
    x = torch.randn(4, 48, requires_grad=True)
    with torch.no_grad():
        mlp.up_proj.weight.copy_(-mlp.up_proj.weight.abs())
    mlp(x.abs()).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0


def test_the_feed_forward_block_has_the_gradients_of_its_formula() -> None:
    mlp = Transformer(NEMOTRON).model.layers[0].mlp
    x = torch.randn(2, 4, 48, requires_grad=True)
    inputs = (x, mlp.up_proj.weight, mlp.down_proj.weight)
    upstream = torch.randn(2, 4, 48)
    expected = torch.relu(x @ inputs[1].T).square() @ inputs[2].T
    actual = mlp(x)
    torch.testing.assert_close(actual, expected)
    for got, want in zip(
        torch.autograd.grad(actual, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_a_frozen_feed_forward_weight_gets_no_gradient_and_changes_no_other() -> None:
    mlp = Transformer(NEMOTRON).model.layers[0].mlp
    x = torch.randn(4, 48, requires_grad=True)
    (expected,) = torch.autograd.grad(mlp(x).sum(), x)
    for frozen in ("up_proj", "down_proj"):
        mlp.requires_grad_(True)
        mlp.get_submodule(frozen).requires_grad_(False)
        x.grad = None
        mlp.zero_grad()
        mlp(x).sum().backward()
        torch.testing.assert_close(x.grad, expected)
        assert [name for name, weight in mlp.named_parameters() if weight.grad is None] == [
            f"{frozen}.weight"
        ]


def test_a_second_backward_pass_through_the_feed_forward_block_is_an_error() -> None:
    mlp = Transformer(NEMOTRON).model.layers[0].mlp
    total = mlp(torch.randn(4, 48)).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_layernorm1p_adds_one_in_float32() -> None:
    norm = Transformer(NEMOTRON).model.norm.to(torch.bfloat16)
    with torch.no_grad():
        norm.weight.fill_(0.013)
    x = torch.randn(8, 48).to(torch.bfloat16)
    gamma = norm.weight.float() + 1
    expected = torch.nn.functional.layer_norm(x.float(), (48,), gamma, None, 1e-5).to(torch.bfloat16)
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 5}, "num_heads \\(5\\) is not divisible by num_kv_heads \\(2\\)"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"rotary_fraction": 0.0}, "rotary_fraction is 0.0"),
        ({"head_dim": 6}, "rotary_dim \\(3 of 6\\) is odd"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**{**NEMOTRON.__dict__, **change})


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
