"""Shapes that nobody thought of: products and whole steps, the same bits under every instruction set."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron4.inference.native.library import Form
from nemotron4.inference.runner import Array
from nemotron4.inference.scheduler import Sequence, Slice
from nemotron4.model.config import ModelConfig
from tests.inference import native_twin as twin
from tests.inference.small_engine import random_model, random_prompts, small_runner
from tests.inference.test_native import (
    HERE,
    NATIVE,
    of_equal_bits,
    packed,
    product,
    random,
    steps_of_equal_bits,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(list(Form)),
    st.integers(1, 70),
    st.integers(1, 200),
    st.integers(1, 70),
    st.booleans(),
)
def test_products_of_any_shape(kind: Form, rows: int, cols: int, outputs: int, is_wide: bool) -> None:
    x_MK, weight_RK = random(rows, cols), random(outputs, cols, seed=1)
    weight = packed(weight_RK, kind)
    found = [product(x_MK, weight, isa, is_wide=is_wide) for isa in of_equal_bits(kind)]
    assert all(torch.equal(out, found[0]) for out in found)
    alone = product(x_MK[-1:], weight, is_wide=is_wide)
    assert torch.equal(alone[0], product(x_MK, weight, is_wide=is_wide)[-1])
    if kind == Form.S8:
        assert torch.equal(
            found[0], twin.product(x_MK, *twin.quantised_weight(weight_RK, kind), is_wide=is_wide)
        )


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(NATIVE),
    st.sampled_from([(1, 1), (2, 1), (6, 2), (4, 4), (17, 1)]),
    st.sampled_from([16, 24, 48, 64, 96, 136]),
    st.sampled_from(["relu2", "swiglu"]),
    st.integers(2, 140),
    st.data(),
)
def test_steps_of_any_shape(
    path: str, heads: tuple[int, int], head_dim: int, mlp: str, length: int, data: st.DataObject
) -> None:
    """A prompt in one step and in two, under all instruction sets."""
    config = ModelConfig(
        num_layers=1, hidden_size=40, ffn_hidden_size=72, num_heads=heads[0], num_kv_heads=heads[1],
        head_dim=head_dim, vocab_size=101, context_length=256, mlp=mlp,  # type: ignore[arg-type]
    )  # fmt: skip
    model, [prompt] = random_model(config), random_prompts(length)
    cut = data.draw(st.integers(1, length - 1))
    sequence = Sequence(tuple(prompt), blocks=[3, 0, 4, 1, 2])

    def logits(isa: str, *ends: int) -> Array:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NEMOTRON4_ISA", isa)
            runner = small_runner(model, path, 5)  # type: ignore[arg-type]
        for start, end in pairwise((0, *ends)):
            result = runner.run([Slice(sequence, start, end)])
        return result.logits_RV[0]

    equal = steps_of_equal_bits(path)
    for isas in filter(None, (equal, [isa for isa in HERE if isa not in equal])):
        whole = logits(isas[0], length)
        assert all((logits(isa, cut, length) == whole).all() for isa in isas)
