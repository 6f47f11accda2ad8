"""Rows of token ids packed one behind the other, with a beginning that several have computed once.

Answers to one prompt, as a judge gets them, differ in their ends only. There is no padding: the products are
over the packed positions, and attention is computed for each row over its beginning and itself.

Shape suffixes: N = packed positions, H = query heads, K = key/value heads, E = head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron4.model.causal_attention import causal_attention

SHORTEST_SHARED = 16  # a shorter beginning costs more calls than it saves products


@dataclass(frozen=True)
class SharedStart:
    """Rows by their numbers; ``num_shared`` ids at their beginning are the same."""

    members: tuple[int, ...]
    num_shared: int


def share(rows: Sequence[Sequence[int]]) -> list[SharedStart]:
    """Each row in one group, so that neighbours in the order of their ids share what saves most.

    At least the last id of every row is its own.
    """
    order = sorted(range(len(rows)), key=lambda number: tuple(rows[number]))
    groups: list[SharedStart] = []
    for number in order:
        last = groups[-1] if groups else None
        if last is not None:
            limit = last.num_shared or len(rows[last.members[0]]) - 1
            common = _common(rows[last.members[0]], rows[number], min(limit, len(rows[number]) - 1))
            saved = (len(last.members) - 1) * last.num_shared
            if common >= SHORTEST_SHARED and len(last.members) * common > saved:
                groups[-1] = SharedStart((*last.members, number), common)
                continue
        groups.append(SharedStart((number,), 0))
    return groups


def _common(first: Sequence[int], second: Sequence[int], limit: int) -> int:
    return next((i for i in range(limit) if first[i] != second[i]), limit)


class PackedRows:
    """The ids and positions of rows, where each ends, and the attention between them."""

    def __init__(self, rows: Sequence[Sequence[int]], device: torch.device) -> None:
        ids: list[int] = []
        positions: list[int] = []
        self._spans: list[tuple[int, list[int]]] = []  # num_shared, and the length of each end after it
        ends = [0] * len(rows)
        for group in share(rows):
            shared = group.num_shared
            ids += rows[group.members[0]][:shared]
            positions += range(shared)
            for number in group.members:
                ids += rows[number][shared:]
                positions += range(shared, len(rows[number]))
                ends[number] = len(ids) - 1
            self._spans.append((shared, [len(rows[number]) - shared for number in group.members]))
        self.ids_N = torch.tensor(ids, device=device)
        self.positions_N = torch.tensor(positions, device=device)
        self.ends = torch.tensor(ends, device=device)

    def __call__(self, layer: int, q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor) -> Tensor:
        parts: list[Tensor] = []
        at = 0
        for shared, lengths in self._spans:
            before = slice(at, at + shared)
            if shared:
                parts.append(_causal(q_NHE[before], k_NKE[before], v_NKE[before]))
            at += shared
            for length in lengths:
                own = slice(at, at + length)
                if shared:
                    k_TKE, v_TKE = (torch.cat([x[before], x[own]]) for x in (k_NKE, v_NKE))
                    parts.append(_after(q_NHE[own], k_TKE, v_TKE))
                else:
                    parts.append(_causal(q_NHE[own], k_NKE[own], v_NKE[own]))
                at += length
        return torch.cat(parts)


def _causal(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
    return causal_attention(q_THE[None], k_TKE[None], v_TKE[None])[0]


def _after(q_SHE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
    """The last S of T positions, each over itself and all before it."""
    num_own, num_all = q_SHE.shape[0], k_TKE.shape[0]
    mask_ST = torch.ones(num_own, num_all, dtype=torch.bool, device=q_SHE.device).tril(num_all - num_own)
    q_HSE, k_KTE, v_KTE = (x.transpose(0, 1)[None] for x in (q_SHE, k_TKE, v_TKE))
    has_groups = q_SHE.shape[1] != k_TKE.shape[1]
    out_HSE = F.scaled_dot_product_attention(q_HSE, k_KTE, v_KTE, attn_mask=mask_ST, enable_gqa=has_groups)
    return out_HSE[0].transpose(0, 1)
