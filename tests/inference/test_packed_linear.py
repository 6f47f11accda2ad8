"""Packed products against plain ones, and their sameness whatever the number of rows."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from nemotron4.inference.packed_linear import PackedLinear, can_pack, pack
from tests.inference.small_engine import random_model

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            not can_pack(dtype, torch.device("cpu")), reason=f"oneDNN has no {dtype} product here"
        ),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_products_equal_plain_ones(dtype: torch.dtype, has_bias: bool) -> None:
    layers = [nn.Linear(48, rows, bias=has_bias, dtype=dtype) for rows in (32, 16)]
    x = torch.randn(2, 5, 48, dtype=dtype)
    with torch.no_grad():
        expected = torch.cat([layer(x) for layer in layers], dim=-1)
        actual = PackedLinear(*layers)(x)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(48, 80), (384, 1536), (3072, 768), (576, 960), (768, 4096), (768, 32000)]
)
def test_a_row_gives_the_same_bits_in_any_number_of_rows(
    dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    layer = PackedLinear(nn.Linear(inputs, outputs, bias=False, dtype=dtype))
    x = torch.randn(160, inputs, dtype=dtype)
    together = layer(x)
    for count in (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 128):
        assert torch.equal(layer(x[11 : 11 + count]), together[11 : 11 + count]), count


@pytest.mark.parametrize(
    "isa",  # the best one is what the tests above use; the smallest differs most from it
    ["AVX2", *(pytest.param(f"AVX512_CORE{more}", marks=pytest.mark.slow) for more in ("", "_BF16", "_AMX"))],
)
def test_the_products_keep_their_promises_under_every_instruction_set(isa: str) -> None:
    """oneDNN takes the best that ``isa`` allows. It reads the variable once, so in a process of its own."""
    tests = [
        f"{__file__}::{name}"
        for name in (
            "test_packed_products_equal_plain_ones",
            "test_a_row_gives_the_same_bits_in_any_number_of_rows",
        )
    ]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-3000:]


def test_a_packed_model_gives_the_logits_of_the_plain_one() -> None:
    plain, packed = random_model(), random_model()
    pack(packed)
    tokens_BT = torch.randint(0, 101, (2, 17))
    torch.testing.assert_close(packed(tokens_BT), plain(tokens_BT), atol=1e-4, rtol=1e-4)
