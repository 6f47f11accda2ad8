"""The library's products in plain PyTorch: what each must give, to the last bit or as near as the tests say.

Shape suffixes: M = rows, K = input columns, R = output rows, G = groups of 32 columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron4.inference.native.library import GROUP, Form


def quantised_weight(weight_RK: Tensor, kind: Form) -> tuple[Tensor, Tensor]:
    """Codes (R, G, 32) and float16 scales (R, G, 1), of ``Form.S8``; float32."""
    assert kind == Form.S8
    groups_RG32 = F.pad(weight_RK, (0, -weight_RK.shape[1] % GROUP)).reshape(len(weight_RK), -1, GROUP)
    scale_RG1 = (groups_RG32.abs().amax(-1, keepdim=True) / 127).half().float()
    inverse_RG1 = torch.where(scale_RG1 > 0, 1 / scale_RG1, 0)
    return (groups_RG32 * inverse_RG1).round().clamp(-127, 127), scale_RG1


def quantised_rows(x_MK: Tensor, *, is_wide: bool = False) -> tuple[Tensor, Tensor]:
    """What enters a quantised product: codes (M, G, 32) and scales (M, G, 1) of each 32 columns."""
    most = 128 * 127 if is_wide else 127
    groups_MG32 = F.pad(x_MK, (0, -x_MK.shape[1] % GROUP)).reshape(len(x_MK), -1, GROUP)
    largest_MG1 = groups_MG32.abs().amax(-1, keepdim=True)
    inverse_MG1 = torch.where(largest_MG1 > 0, torch.full_like(largest_MG1, most) / largest_MG1, 0)
    return (groups_MG32 * inverse_MG1).round(), largest_MG1 / most


def product(
    x_MK: Tensor,
    codes_RG32: Tensor,
    scale_RG1: Tensor,
    least_RG1: Tensor | None = None,
    *,
    is_wide: bool = False,
) -> Tensor:
    """(M, R): integers are summed exactly in a group, groups in float32, one after the other."""
    x_MG32, x_scale_MG1 = quantised_rows(x_MK, is_wide=is_wide)
    out_MR = torch.zeros(len(x_MK), len(codes_RG32), dtype=torch.float64)
    for g in range(x_MG32.shape[1]):
        dots_MR = (x_MG32[:, g].double() @ codes_RG32[:, g].double().T).float().double()
        factor_MR = scale_RG1[:, g].T * x_scale_MG1[:, g]
        # A product and a sum with one rounding, as the processors do it.
        out_MR = (dots_MR * factor_MR.double() + out_MR).float().double()
        if least_RG1 is not None:
            sums_M1 = x_scale_MG1[:, g] * x_MG32[:, g].sum(-1, keepdim=True)
            out_MR = (sums_M1.double() * least_RG1[:, g].T.double() + out_MR).float().double()
    return out_MR.float()


def attention_over_codes(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> Tensor:
    """(N, H, E) of one sequence from its first position on, over keys and values of eight bits.

    Queries are codes of sixteen bits, and so are, in each block of 32, the weights times the values' scales.
    """
    num_rows, num_heads, head_dim = q_NHE.shape
    num_kv = k_NKE.shape[1]
    (k_codes, k_scale_NK), (v_codes, v_scale_NK) = (_coded(x) for x in (k_NKE, v_NKE))
    q_codes_NHE, q_scale_NH = _coded(q_NHE, 32767)
    q_NKGE = q_codes_NHE.view(num_rows, num_kv, num_heads // num_kv, head_dim)
    q_scale_KGN1 = q_scale_NH.T.view(num_kv, -1, num_rows, 1)
    score_KGNM = torch.einsum("nkge,mke->kgnm", q_NKGE.double(), k_codes.double()).float()
    score_KGNM *= k_scale_NK.T[:, None, None] * q_scale_KGN1
    later_NM = torch.ones(num_rows, num_rows, dtype=torch.bool).triu(1)
    score_KGNM = (score_KGNM * head_dim**-0.5).masked_fill(later_NM, -torch.inf)
    weight_KGNM = (score_KGNM - score_KGNM.amax(-1, keepdim=True)).exp()
    parts = (weight_KGNM * v_scale_NK.T[:, None, None]).split(32, dim=-1)
    scaled_KGNM = torch.cat(
        [code * scale[..., None] for code, scale in (_coded(x, 32767) for x in parts)], -1
    )
    out_NKGE = torch.einsum("kgnm,mke->nkge", scaled_KGNM, v_codes)
    return (out_NKGE / weight_KGNM.sum(-1).permute(2, 0, 1)[..., None]).reshape(q_NHE.shape)


def attention_over_pairs(q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> Tensor:
    """(N, H, E) of one sequence from its first position on, over keys and values in bfloat16.

    Queries are rounded to it, and so are the weights, relative to the largest score up to their block of 32.
    """
    num_rows, _, head_dim = q_NHE.shape
    q_NHE, k_NKE, v_NKE = (x.bfloat16().float() for x in (q_NHE, k_NKE, v_NKE))
    q_NKGE = q_NHE.view(num_rows, k_NKE.shape[1], -1, head_dim)
    score_KGNM = torch.einsum("nkge,mke->kgnm", q_NKGE, k_NKE) * head_dim**-0.5
    score_KGNM.masked_fill_(torch.ones(num_rows, num_rows, dtype=torch.bool).triu(1), -torch.inf)
    largest_KGN1 = torch.full_like(score_KGNM[..., :1], -torch.inf)
    total_KGN1, sum_KGNE = torch.zeros_like(largest_KGN1), torch.zeros(1)
    for part_KGNM, v_MKE in zip(score_KGNM.split(32, dim=-1), v_NKE.split(32), strict=True):
        now_KGN1 = torch.maximum(largest_KGN1, part_KGNM.amax(-1, keepdim=True))
        shrink_KGN1, largest_KGN1 = (largest_KGN1 - now_KGN1).exp(), now_KGN1
        weight_KGNM = (part_KGNM - now_KGN1).exp().bfloat16().float()
        total_KGN1 = total_KGN1 * shrink_KGN1 + weight_KGNM.sum(-1, keepdim=True)
        sum_KGNE = sum_KGNE * shrink_KGN1 + torch.einsum("kgnm,mke->kgne", weight_KGNM, v_MKE)
    return (sum_KGNE / total_KGN1).permute(2, 0, 1, 3).reshape(q_NHE.shape)


def _coded(x: Tensor, most: int = 127) -> tuple[Tensor, Tensor]:
    """Whole numbers up to ``most``, and what one is worth in each row; zeros stay zeros."""
    largest = x.abs().amax(-1)
    return (x * (most / largest.clamp(min=1e-30))[..., None]).round(), largest / most


def product_bf16(x_MK: Tensor, weight_RK: Tensor) -> Tensor:
    """(M, R), in the order of AMX's tiles: of 32 columns the even ones, the odd ones, then both sums."""
    x_MK, weight_RK = (
        F.pad(t, (0, -t.shape[1] % 32)).bfloat16().double() for t in (x_MK, weight_RK)
    )  # fmt: skip
    out_MR = torch.zeros(len(x_MK), len(weight_RK))
    for k in range(0, x_MK.shape[1], 32):
        sums = [torch.zeros_like(out_MR) for _ in range(2)]
        for i in range(k, k + 32):
            products_MR = x_MK[:, i, None] * weight_RK[:, i]  # exact in float64, so one rounding
            sums[i % 2] = (products_MR + sums[i % 2].double()).float()
        out_MR += sums[0] + sums[1]
    return out_MR


def product_pairs(x_MK: Tensor, weight_RK: Tensor) -> Tensor:
    """(M, R), as AVX-512 BF16 adds: of each two columns the second, then the first."""
    x_MK, weight_RK = (F.pad(t, (0, t.shape[1] % 2)).bfloat16().double() for t in (x_MK, weight_RK))
    out_MR = torch.zeros(len(x_MK), len(weight_RK))
    for k in range(0, x_MK.shape[1], 2):
        for i in (k + 1, k):
            out_MR = (x_MK[:, i, None] * weight_RK[:, i] + out_MR.double()).float()
    return out_MR
