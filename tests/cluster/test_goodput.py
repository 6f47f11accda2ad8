"""Failures of a long run: published rates, the interval between checkpoints, the time that is left."""

from __future__ import annotations

import pytest

from nemotron4.cluster.goodput import GPU_HOURS_BETWEEN_FAILURES, Failures, best_interval_s, simulate

DAY = 86_400.0
LLAMA = Failures(gpu_hours_between=GPU_HOURS_BETWEEN_FAILURES["llama-3"], write_s=60, restart_s=600)


def test_the_published_run_fails_every_three_hours() -> None:
    assert LLAMA.mean_time_s(16_384) / 3600 == pytest.approx(3.09, abs=0.01)


def test_the_simulated_share_is_the_one_of_the_formula() -> None:
    found = simulate(LLAMA, 6_144, 80 * DAY)
    mean_s, step_s = LLAMA.mean_time_s(6_144), found.interval_s
    # To first order: writing, half a stretch lost at each failure, and the restart.
    expected = 1 / (1 + LLAMA.write_s / step_s + (step_s / 2 + LLAMA.write_s + LLAMA.restart_s) / mean_s)
    assert found.mean == pytest.approx(expected, abs=0.005)
    assert found.low <= found.mean <= found.high
    assert found.failures == pytest.approx(80 * DAY / expected / mean_s, rel=0.02)


@pytest.mark.parametrize("factor", [0.2, 5])
def test_another_interval_is_worse(factor: float) -> None:
    best = simulate(LLAMA, 6_144, 80 * DAY)
    assert simulate(LLAMA, 6_144, 80 * DAY, interval_s=factor * best.interval_s).mean < best.mean - 0.01


def test_a_run_without_failures_only_writes() -> None:
    never = Failures(gpu_hours_between=1e15, write_s=10, restart_s=600)
    found = simulate(never, 8, DAY, interval_s=990)
    assert found.failures == 0
    assert found.mean == pytest.approx(0.99, abs=0.001)
    assert best_interval_s(never, 8) > DAY
