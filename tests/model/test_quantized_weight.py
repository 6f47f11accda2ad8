"""Frozen weights of eight and four bits, and products with them."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch

from nemotron4.model.adapter_config import Codes
from nemotron4.model.quantized_weight import NF4, CodedWeight


def quantized(weight_RK: torch.Tensor, kind: Codes) -> CodedWeight:
    made = CodedWeight(*weight_RK.shape, kind)
    half = len(weight_RK) // 2
    made.put(0, weight_RK[:half])
    made.put(half, weight_RK[half:])
    return made


@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize(("kind", "step"), [("int8", 1 / 127), ("int4", 1 / 7.5), ("nf4", 0.304)])
def test_a_weight_is_within_half_a_step_of_its_codes(kind: Codes, step: float, columns: int) -> None:
    weight_RK = torch.randn(10, columns, generator=torch.Generator().manual_seed(1))
    weight_RK[3] = 0.0
    found = quantized(weight_RK, kind)
    largest = weight_RK.abs().max()
    assert (found.whole(torch.float32) - weight_RK).abs().max() <= 0.51 * step * largest + 1e-2 * step
    assert not found.whole(torch.float32)[3].any()
    used = sum(buffer.nbytes for buffer in found.buffers())
    assert used / weight_RK.numel() <= {"int8": 1.07, "int4": 0.63, "nf4": 0.54}[kind] * (
        1 if columns == 64 else 1.3
    )


def test_nf4_has_the_nearest_of_the_published_values() -> None:
    """The values are quantiles of the normal distribution: Dettmers et al. 2023, as their code makes them."""
    most, normal = 0.9677083, NormalDist()
    above = [normal.inv_cdf(most + (0.5 - most) * i / 8) for i in range(8)]
    below = [-normal.inv_cdf(most + (0.5 - most) * i / 7) for i in range(7)]
    assert [value * above[0] for value in NF4] == pytest.approx(sorted([*below, 0.0, *above]), abs=1e-6)
    weight_RK = torch.randn(6, 128, generator=torch.Generator().manual_seed(3))
    units = weight_RK.view(6, 2, 64) / weight_RK.view(6, 2, 64).abs().amax(-1).half().float()[..., None]
    apart, nearest = (units[..., None] - torch.tensor(NF4)).abs().min(-1)
    got = quantized(weight_RK, "nf4").whole(torch.float32).view(6, 2, 64)
    scale = weight_RK.view(6, 2, 64).abs().amax(-1).half().float()[..., None]
    assert torch.equal(got, torch.tensor(NF4)[nearest] * scale)
    assert apart.max() < 0.16


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_product_and_its_gradient_are_those_of_the_whole_weight(kind: Codes) -> None:
    generator = torch.Generator().manual_seed(2)
    found = quantized(torch.randn(12, 64, generator=generator), kind)
    x = torch.randn(3, 5, 64, generator=generator).requires_grad_()
    whole = found.whole(torch.float32)
    slope = torch.randn(3, 5, 12, generator=generator)
    [got] = torch.autograd.grad(found(x), x, slope)
    [want] = torch.autograd.grad(x @ whole.T, x, slope)
    torch.testing.assert_close(found(x), x @ whole.T)
    torch.testing.assert_close(got, want)
