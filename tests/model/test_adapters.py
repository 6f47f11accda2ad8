"""Adapters: nothing changes when fresh, PEFT reads and agrees, merging equals running beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemotron4.errors import CheckpointError, ConfigError
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapter_files import adapter_tensors, load_adapter, lora_from_nemo, write_adapter
from nemotron4.model.adapters import LoraLinear, PromptEmbedding, adapted_modules, adapters_off, add_adapter
from nemotron4.model.config import ModelConfig
from nemotron4.model.transformer import Transformer

CONFIG = ModelConfig(
    num_layers=2, hidden_size=16, ffn_hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
    vocab_size=50, context_length=64, init_std=0.2,
)  # fmt: skip
TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5]])
LORA = AdapterConfig(kind="lora", rank=4, alpha=8, targets=("all",))
BOTTLENECK = AdapterConfig(kind="bottleneck", rank=4)
P_TUNING = AdapterConfig(kind="p_tuning", num_virtual_tokens=3, encoder_hidden_size=8)


def fresh_model() -> Transformer:
    model = Transformer(CONFIG)
    model.initialise(seed=1)
    return model


def disturb(model: Transformer) -> None:
    """Give every trainable parameter a value of its own, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("config", [LORA, BOTTLENECK], ids=lambda c: c.kind)
def test_a_fresh_adapter_changes_nothing(config: AdapterConfig) -> None:
    model = fresh_model()
    before = model(TOKENS)
    add_adapter(model, config, seed=0)
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("config", [LORA, BOTTLENECK, P_TUNING], ids=lambda c: c.kind)
def test_the_base_is_frozen_and_keeps_its_names(config: AdapterConfig) -> None:
    model = fresh_model()
    names = set(model.state_dict())
    add_adapter(model, config, seed=0)
    assert names <= set(model.state_dict())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert not trainable & names


@pytest.mark.parametrize("config", [LORA, BOTTLENECK], ids=lambda c: c.kind)
def test_switching_adapters_off_gives_the_base_model(config: AdapterConfig) -> None:
    model = fresh_model()
    before = model(TOKENS)
    add_adapter(model, config, seed=0)
    disturb(model)
    assert not torch.allclose(model(TOKENS), before)
    with adapters_off(model):
        assert torch.equal(model(TOKENS), before)
    assert not torch.allclose(model(TOKENS), before)


def test_merged_lora_equals_running_beside() -> None:
    model = fresh_model()
    add_adapter(model, LORA, seed=0)
    disturb(model)
    beside = model(TOKENS)
    merged = fresh_model()
    for name, module in adapted_modules(model).items():
        assert isinstance(module, LoraLinear)
        update = module.lora_B.weight @ module.lora_A.weight
        scale = LORA.alpha / LORA.rank
        merged.get_submodule(name).weight = torch.nn.Parameter(module.weight + scale * update)
    torch.testing.assert_close(merged(TOKENS), beside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [LORA, BOTTLENECK], ids=lambda c: c.kind)
def test_a_saved_adapter_loads_into_the_same_logits(config: AdapterConfig, tmp_path: Path) -> None:
    model = fresh_model()
    add_adapter(model, config, seed=0)
    disturb(model)
    write_adapter(tmp_path, adapter_tensors(model, config), config, base="base")
    loaded = fresh_model()
    load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_p_tuning_puts_the_encoder_in_front_and_keeps_only_the_table(tmp_path: Path) -> None:
    model = fresh_model()
    before = model(TOKENS)
    add_adapter(model, P_TUNING, seed=0)
    assert torch.equal(model(TOKENS), before)
    disturb(model)
    prompted = torch.cat([torch.tensor([[50, 51, 52]]), TOKENS], dim=1)
    expected = model(prompted)
    assert not torch.allclose(expected[:, 3:], before)
    write_adapter(tmp_path, adapter_tensors(model, P_TUNING), P_TUNING, base="base")
    loaded = fresh_model()
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(loaded(prompted), expected, rtol=1e-6, atol=1e-6)
    assert not any("prompt_first" in name for name in loaded.state_dict())


def test_p_tuning_encoder_follows_its_equations() -> None:
    model = fresh_model()
    add_adapter(model, P_TUNING, seed=0)
    embedding = model.model.embed_tokens
    assert isinstance(embedding, PromptEmbedding)
    first, second = embedding.prompt_first, embedding.prompt_second
    x = embedding.prompt_embedding.weight @ first.weight.T + first.bias
    gelu = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    torch.testing.assert_close(embedding.table(), gelu @ second.weight.T + second.bias)


def test_bottleneck_follows_its_equation() -> None:
    model = fresh_model()
    add_adapter(model, BOTTLENECK, seed=0)
    disturb(model)
    module = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    y = x @ module.weight.T
    normal = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    z = (normal * module.adapter_norm.weight + module.adapter_norm.bias) @ module.adapter_down.weight.T
    expected = y + (z * z.sigmoid()) @ module.adapter_up.weight.T
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_target_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="query_proj") as caught:
        add_adapter(fresh_model(), AdapterConfig(kind="lora", targets=("query_proj",)), seed=0)
    assert caught.value.hint is not None
    assert "q_proj" in caught.value.hint


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = fresh_model()
    add_adapter(model, LORA, seed=0)
    write_adapter(tmp_path, adapter_tensors(model, LORA), LORA, base="base")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"r": 3}))
    with pytest.raises(CheckpointError, match="shape"):
        load_adapter(fresh_model(), tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 2.5}},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": "8"}},
        {"alpha_pattern": {"(q_proj": 8}},
        {"lora_bias": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"alora_invocation_tokens": [1, 2]},
    ],
)
def test_lora_forms_that_would_be_served_wrongly_are_refused(setting: dict, tmp_path: Path) -> None:
    model = fresh_model()
    add_adapter(model, LORA, seed=0)
    write_adapter(tmp_path, adapter_tensors(model, LORA), LORA, base="base")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | setting))
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        load_adapter(fresh_model(), tmp_path)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_give_modules_ranks_and_alphas_of_their_own(use_rslora: bool, tmp_path: Path) -> None:
    config = AdapterConfig(
        kind="lora", rank=4, alpha=6, targets=("q_proj", "up_proj"), use_rslora=use_rslora,
        # The second of two that match does not count; "proj" alone is the end of no name's part.
        rank_pattern={"proj": 9, r"layers\.0\.self_attn\.q_proj": 2, "q_proj": 3},
        alpha_pattern={"q_pro.": 5, "model.layers.1.mlp.up_proj": 1.5},
    )  # fmt: skip
    model = fresh_model()
    add_adapter(model, config, seed=0)
    disturb(model)
    expected = {
        "model.layers.0.self_attn.q_proj": (2, 5), "model.layers.1.self_attn.q_proj": (3, 5),
        "model.layers.0.mlp.up_proj": (4, 6), "model.layers.1.mlp.up_proj": (4, 1.5),
    }  # fmt: skip
    for name, module in adapted_modules(model).items():
        rank, alpha = expected.pop(name)
        assert isinstance(module, LoraLinear)
        assert module.lora_A.weight.shape[0] == rank
        assert module.scale == pytest.approx(alpha / (rank**0.5 if use_rslora else rank))
    assert not expected
    write_adapter(tmp_path, adapter_tensors(model, config), config, base="base")
    loaded = fresh_model()
    assert load_adapter(loaded, tmp_path) == config
    assert torch.equal(loaded(TOKENS), model(TOKENS))


def test_nemo_fused_lora_equals_three_separate_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, size, rank, hidden = 6, 2, 4, 3, 10
    a = torch.randn(rank, hidden, generator=generator)
    fused = torch.randn(kv_heads * (heads // kv_heads + 2) * size, rank, generator=generator)
    parts = lora_from_nemo(a, fused, num_heads=heads, num_kv_heads=kv_heads, head_dim=size)
    x = torch.randn(hidden, generator=generator)
    grouped = (fused @ (a @ x)).view(kv_heads, heads // kv_heads + 2, size)
    separate = {name: (b @ (a_ @ x)).view(-1, size) for name, (a_, b) in parts.items()}
    torch.testing.assert_close(separate["q_proj"], grouped[:, :-2].reshape(-1, size))
    torch.testing.assert_close(separate["k_proj"], grouped[:, -2])
    torch.testing.assert_close(separate["v_proj"], grouped[:, -1])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_peft_loads_the_saved_lora_and_computes_the_same_logits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.NemotronConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, partial_rotary_factor=0.5, attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.NemotronForCausalLM(hf_config).eval()
    model = fresh_model()
    theirs.load_state_dict(model.state_dict())
    config = AdapterConfig(kind="lora", rank=4, alpha=6, targets=("attention", "up_proj"))
    add_adapter(model, config, seed=0)
    disturb(model)
    write_adapter(tmp_path, adapter_tensors(model, config), config, base="base")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path)
    torch.testing.assert_close(adapted(TOKENS).logits, model(TOKENS), rtol=1e-5, atol=1e-5)
    again = fresh_model()
    adapted.save_pretrained(tmp_path / "theirs")
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(again(TOKENS), model(TOKENS), rtol=1e-6, atol=1e-6)
