from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from nemotron4.errors import DataError
from nemotron4.grading import length_control
from nemotron4.grading.length_control import GamedRow, fit_logistic_l1, length_controlled, sigmoid


def _rows(num_rows: int = 400, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(200, 3000, num_rows)
    difficulty = generator.normal(0, 1, num_rows)
    return lengths, difficulty, generator.normal(0, 0.3, num_rows)


GAMED = [GamedRow(0.3, 1.0, 0.2), GamedRow(0.7, -1.0, -0.1)] * 20


def test_the_fit_meets_the_optimality_conditions_of_the_l1_problem() -> None:
    generator = np.random.default_rng(3)
    features = generator.normal(size=(300, 3))
    target = sigmoid(features @ np.array([1.0, -0.5, 0.0]))
    weight = np.ones(300)
    for inverse_penalty in (0.001, 0.05, 10.0):
        fitted = fit_logistic_l1(features, target, weight, inverse_penalty=inverse_penalty)
        gradient = inverse_penalty * features.T @ (sigmoid(features @ fitted) - target)
        for slope, value in zip(gradient, fitted, strict=True):
            if value:
                assert slope == pytest.approx(-np.sign(value), abs=1e-5)
            else:
                assert abs(slope) <= 1 + 1e-5


def test_a_longer_model_of_equal_quality_loses_its_advantage() -> None:
    baseline, difficulty, noise = _rows()
    model = baseline + 800
    model[::2] = baseline[::2] - 800
    delta = (baseline - model) / np.std(baseline - model, ddof=1)
    preference = sigmoid(-1.5 * np.tanh(delta) + 0.5 * difficulty + noise)
    # judge only where the model is longer twice as often: the raw rate rewards length
    raw = float(preference[1::2].mean())
    result = length_controlled(preference, baseline, model, difficulty, GAMED)
    assert raw > 0.7
    assert result.win_rate == pytest.approx(50, abs=4)
    assert result.weights[0] < 0


def test_mirrored_preferences_give_the_mirrored_win_rate() -> None:
    baseline, difficulty, noise = _rows(seed=1)
    model = np.roll(baseline, 1)
    preference = sigmoid(noise)
    here = length_controlled(preference, baseline, model, difficulty, [])
    there = length_controlled(1 - preference, model, baseline, difficulty, [])
    assert here.win_rate + there.win_rate == pytest.approx(100, abs=0.2)


def test_equal_lengths_cannot_be_controlled() -> None:
    with pytest.raises(DataError, match="never differ"):
        length_controlled([0.5] * 10, [3] * 10, [3] * 10, [0.0] * 10, GAMED)


def test_the_files_users_bring_give_a_finite_score() -> None:
    if "NEMOTRON4_SHARED" not in os.environ:
        pytest.skip("set NEMOTRON4_SHARED to the folder that holds data/eval")
    folder = Path(os.environ["NEMOTRON4_SHARED"]) / "data/eval/alpaca_eval_2"
    with (folder / "instruction_difficulty.csv").open() as lines:
        difficulty = [float(row["instruction_difficulty"]) for row in csv.DictReader(lines)]
    with gzip.open(folder / "df_gamed_equivalent.csv.gz", "rt") as lines:
        columns = ("preference", "std_delta_len", "instruction_difficulty")
        gamed = [GamedRow(*(float(row[name]) for name in columns)) for row in csv.DictReader(lines)]
    assert (len(difficulty), len(gamed)) == (805, 1610)
    baseline, _, noise = _rows(805)
    result = length_controlled(sigmoid(noise), baseline, np.roll(baseline, 3), difficulty, gamed)
    assert 40 < result.win_rate < 60
    assert result.inverse_penalty in length_control.PENALTIES
