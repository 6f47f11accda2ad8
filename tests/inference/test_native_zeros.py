"""Weights stored by input, whose lines of zero inputs are not read: the bits of those in panels."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron4.inference.load import load
from nemotron4.inference.native import model as native
from nemotron4.inference.native.library import Form
from nemotron4.inference.native.model import STORED, Weight
from nemotron4.inference.scheduler import Sequence, Slice
from nemotron4.model.config import ModelConfig
from nemotron4.model.transformer import Transformer
from tests.inference import native_twin as twin
from tests.inference.small_engine import random_model, random_prompts, small_runner
from tests.inference.test_native import HERE, LIBRARY, packed, product, random
from tests.tiny_models import nemotron_directory

KINDS = [Form.S8, Form.U4]
PROTECTED = """
import ctypes, mmap, sys
import numpy as np
from nemotron4.inference.native.library import Form, library, load_kernels
from nemotron4.inference.native.model import packed
kind, page, columns, num_rows, used = (int(a) for a in sys.argv[1:6])
weight_RK = np.ones((128, 4 * columns), np.float32)
weight = packed(weight_RK, Form(kind), is_by_input=True)
x_MK = np.zeros((num_rows, 4 * columns), np.float32)
x_MK[:, 1], x_MK[-1, used] = 1, 1
own = np.frombuffer(mmap.mmap(-1, len(weight.codes)), np.uint8)
own[:] = weight.codes
weight.codes = own
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mprotect(ctypes.c_void_p(weight.codes.ctypes.data + 2 * page), page, 0) == 0
out_MR = np.empty((num_rows, 128), np.float32)
arguments = (weight.as_c(), x_MK.ctypes.data, num_rows, sys.argv[6].encode(), out_MR.ctypes.data)
load_kernels(sys.argv[6])
assert library().native_product(*arguments)
assert abs(out_MR[-1] - 2).max() < 0.05, out_MR
"""


def by_input(weight_RK: torch.Tensor, kind: Form) -> Weight:
    return native.packed(weight_RK.contiguous().numpy(), kind, is_by_input=True)


def with_zeros(rows: int, cols: int, share: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return random(rows, cols) * (torch.rand(rows, cols, generator=generator) >= share)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_rows_gives_the_bits_of_panels(kind: Form, share: float) -> None:
    weight_RK = random(200, 353, seed=1)
    panels, lines = packed(weight_RK, kind), by_input(weight_RK, kind)
    for rows in (1, 2, 3, 4, 5, 8, 9, 12, 16, 31, 32, 33, 70, 300):
        x_MK = with_zeros(rows, 353, share)
        for is_wide in (False, True):
            expected = product(x_MK, panels, is_wide=is_wide)
            for isa in HERE:
                assert torch.equal(product(x_MK, lines, isa, is_wide=is_wide), expected), (rows, is_wide, isa)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 40),
    st.integers(1, 200),
    st.integers(1, 300),
    st.booleans(),
    st.sampled_from([0.3, 0.8, 0.97]),
)
def test_any_shape_gives_the_bits_of_panels(
    kind: Form, rows: int, cols: int, outputs: int, is_wide: bool, share: float
) -> None:
    x_MK, weight_RK = with_zeros(rows, cols, share), random(outputs, cols, seed=1)
    found = [product(x_MK, by_input(weight_RK, kind), isa, is_wide=is_wide) for isa in HERE]
    assert all(torch.equal(out, found[0]) for out in found)
    assert torch.equal(found[0], product(x_MK, packed(weight_RK, kind), is_wide=is_wide))
    if kind == Form.S8:
        expected = twin.product(x_MK, *twin.quantised_weight(weight_RK, kind), is_wide=is_wide)
        assert torch.equal(found[0], expected)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("num_rows", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected as Linux does it")
def test_lines_of_zero_inputs_are_not_read(kind: Form, num_rows: int, isa: str) -> None:
    """A page of them, which ends the process that reads it, where one of its columns is used."""
    columns = mmap.PAGESIZE // 64  # whose lines fill a page
    codes = []
    for used in (2 * columns - 1, 2 * columns, 3 * columns - 1, 3 * columns):
        arguments = [int(kind), mmap.PAGESIZE, columns, num_rows, used, isa]
        command = [sys.executable, "-c", PROTECTED, *map(str, arguments)]
        codes.append(subprocess.run(command, capture_output=True).returncode)
    assert codes == [0, -signal.SIGSEGV, -signal.SIGSEGV, 0]


@pytest.mark.parametrize("name", STORED)
def test_stored_gguf_blocks_lie_by_input_too(name: str) -> None:
    number, kind = STORED[name]
    num_bytes = (
        34 * 512 // 32
    )  # of a row; Q8_0 has most. Any bytes will do, and those below 60 as half floats too
    stored = np.random.default_rng(0).integers(0, 60, (144, num_bytes), dtype=np.uint8)
    x_MK, found = with_zeros(3, 512, 0.8), []
    for is_by_input in (False, True):
        weight = Weight.empty(kind, 144, 512, is_by_input=is_by_input)
        assert LIBRARY.native_pack_gguf(weight.as_c(), number, stored.ctypes.data, 0, 144)
        found.append(product(x_MK, weight))
    assert torch.equal(*found)
    assert found[0].isfinite().all()
    assert found[0].abs().max() > 0


def sparse_model() -> Transformer:
    """Nine in ten numbers behind its squared ReLUs are zero."""
    config = ModelConfig(
        num_layers=4, hidden_size=72, ffn_hidden_size=296, num_heads=4, num_kv_heads=2, head_dim=16,
        vocab_size=101, context_length=256,
    )  # fmt: skip
    model = random_model(config)
    for layer in model.model.layers:
        norm, up = layer.post_attention_layernorm, layer.mlp.up_proj
        norm.weight[0], norm.bias[0] = -1, 1  # the first dimension is one
        up.weight[:, 0] = -1.3 * (up.weight[:, 1:] * (1 + norm.weight[1:])).norm(dim=1)
    return model


@pytest.mark.parametrize("path", ["int8", "int4"])
def test_steps_give_the_bits_of_panels(path: str) -> None:
    model = sparse_model()
    zeros: list[float] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda _, inputs: zeros.append(float((inputs[0] == 0).float().mean()))
        )
    model(torch.tensor(random_prompts(200)))
    assert min(zeros) > 0.7
    runners = [small_runner(model, path, 16, is_for_few=few) for few in (False, True)]  # type: ignore[arg-type]
    for count in (1, 2, 3, 4, 5, 8):
        sequences = [
            Sequence(tuple(prompt), blocks=[2 * i, 2 * i + 1])
            for i, prompt in enumerate(random_prompts(*range(40, 40 + count)))
        ]
        found = []
        for runner in runners:
            runner.run([Slice(sequence, 0, sequence.length - 1) for sequence in sequences])
            steps = [Slice(sequence, sequence.length - 1, sequence.length) for sequence in sequences]
            found.append(runner.run(steps).logits_RV)
        assert (found[0] == found[1]).all(), count


@pytest.mark.parametrize(("max_running", "is_by_input"), [(1, True), (4, True), (5, False)])
def test_an_engine_for_few_rows_leaves_zeros_out(max_running: int, is_by_input: bool, tmp_path: Path) -> None:
    folder = nemotron_directory(tmp_path)
    with load(folder, quantize="int8", max_running=max_running) as engine:
        weights = engine._runner.model.weights
    expected = {name for name in weights if name.endswith("mlp.down_proj")} if is_by_input else set()
    assert {name for name, weight in weights.items() if weight.is_by_input} == expected
