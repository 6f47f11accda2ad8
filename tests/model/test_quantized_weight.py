"""Frozen weights of eight and four bits, and products with them."""

from __future__ import annotations

import pytest
import torch

from nemotron4.model.quantized_weight import CodedWeight


def quantized(weight_RK: torch.Tensor, bits: int) -> CodedWeight:
    made = CodedWeight(*weight_RK.shape, bits)  # type: ignore[arg-type]
    half = len(weight_RK) // 2
    made.put(0, weight_RK[:half])
    made.put(half, weight_RK[half:])
    return made


@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize(("bits", "step"), [(8, 1 / 127), (4, 1 / 7.5)])
def test_a_weight_is_within_half_a_step_of_its_codes(bits: int, step: float, columns: int) -> None:
    weight_RK = torch.randn(10, columns, generator=torch.Generator().manual_seed(1))
    weight_RK[3] = 0.0
    found = quantized(weight_RK, bits)
    largest = weight_RK.abs().max()
    assert (found.whole(torch.float32) - weight_RK).abs().max() <= 0.51 * step * largest + 1e-2 * step
    assert not found.whole(torch.float32)[3].any()
    used = sum(buffer.nbytes for buffer in found.buffers())
    assert used / weight_RK.numel() <= (1.07 if bits == 8 else 0.63) * (1 if columns == 64 else 1.3)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_and_its_gradient_are_those_of_the_whole_weight(bits: int) -> None:
    generator = torch.Generator().manual_seed(2)
    found = quantized(torch.randn(12, 64, generator=generator), bits)
    x = torch.randn(3, 5, 64, generator=generator).requires_grad_()
    whole = found.whole(torch.float32)
    slope = torch.randn(3, 5, 12, generator=generator)
    [got] = torch.autograd.grad(found(x), x, slope)
    [want] = torch.autograd.grad(x @ whole.T, x, slope)
    torch.testing.assert_close(found(x), x @ whole.T)
    torch.testing.assert_close(got, want)
