"""A beginning that rows share is computed once, and changes no score."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nemotron4.inference.shared_rows import PackedRows, SharedStart, share
from nemotron4.model.reward_head import RewardModel
from tests.inference.small_engine import SMALL

PROMPT, OTHER = list(range(40)), list(range(60, 90))
ROWS = [
    [*PROMPT, 50, 51],
    [9, 8, 7],
    [*PROMPT, 50, 52, 53, 54],
    PROMPT,
    [*OTHER, 1],
    [*PROMPT, 50, 51],  # twice
    [*OTHER, 2, 3],
    [*PROMPT[:20], 99, 98],
    [5],
]


def test_rows_that_begin_alike_are_one_group() -> None:
    groups = share(ROWS)
    assert sorted(number for group in groups for number in group.members) == list(range(len(ROWS)))
    assert SharedStart((4, 6), 30) in groups
    for group in groups:
        beginnings = {tuple(ROWS[number][: group.num_shared]) for number in group.members}
        assert len(beginnings) == 1
        assert all(len(ROWS[number]) > group.num_shared for number in group.members)
    packed = PackedRows(ROWS, torch.device("cpu"))
    assert len(packed.ids_N) < sum(map(len, ROWS)) - 2 * len(PROMPT) - len(OTHER) + 10
    assert packed.ids_N[packed.ends].tolist() == [row[-1] for row in ROWS]


@pytest.mark.parametrize("num_kv_heads", [2, 6])
def test_scores_are_those_of_each_row_alone(num_kv_heads: int) -> None:
    config = dataclasses.replace(SMALL, num_kv_heads=num_kv_heads, num_reward_attributes=9)
    model = RewardModel(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.1, generator=generator)

    def scores(rows: list[list[int]]) -> torch.Tensor:
        packed = PackedRows(rows, torch.device("cpu"))
        found: torch.Tensor = model(model.model(packed.ids_N, packed.positions_N, packed)[packed.ends])
        return found

    alone = torch.cat([scores([row]) for row in ROWS])
    torch.testing.assert_close(scores(ROWS), alone, atol=1e-5, rtol=1e-5)
