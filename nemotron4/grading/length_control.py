"""AlpacaEval 2's length-controlled win rate (Dubois et al. 2024), without its package.

One logistic regression per model: logit P(model preferred) = b1 tanh(dlen / sd) + b2 difficulty + b3, where
dlen is baseline length minus model length in characters. It is fitted on the model's rows (weight 1) and on
two baselines with gamed lengths (weight 0.1, without b3), with an L1 penalty chosen by 5-fold
cross-validation. The score is the mean prediction at dlen = 0. Difficulties and gamed rows are inputs: the
package keeps them on a model hub.

N = rows, F = features: tanh(dlen), difficulty, not gamed
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemotron4.errors import DataError
from nemotron4.grading.statistics import Array, standard_error

GAMED_WEIGHT = 0.1
NUM_FOLDS = 5
PENALTIES = tuple(float(c) for c in np.logspace(-4, 4, 10))  # inverse strengths, as scikit-learn's C


@dataclass(frozen=True)
class GamedRow:
    """A judged row of a baseline whose length was gamed; ``std_delta_len`` is already divided by its sd."""

    preference: float
    std_delta_len: float
    difficulty: float


@dataclass(frozen=True)
class LengthControlled:
    """``win_rate`` and ``standard_error`` in percent; the weights of (length, difficulty, model)."""

    win_rate: float
    standard_error: float
    weights: tuple[float, float, float]
    inverse_penalty: float


def fit_logistic_l1(
    features_NF: Array, target_N: Array, weight_N: Array, *, inverse_penalty: float, iterations: int = 200
) -> Array:
    """argmin ||w||_1 + C sum_i weight_i CE(target_i, sigmoid(x_i w)); targets are probabilities.

    Proximal Newton: a quadratic model of the loss, minimised by coordinate descent, with step halving.
    """
    weights_F = np.zeros(features_NF.shape[1])
    value = _objective(features_NF, target_N, weight_N, weights_F, inverse_penalty)
    for _ in range(iterations):
        predicted_N = sigmoid(features_NF @ weights_F)
        gradient_F = inverse_penalty * features_NF.T @ (weight_N * (predicted_N - target_N))
        curvature_N = weight_N * predicted_N * (1 - predicted_N)
        hessian_FF = inverse_penalty * (features_NF.T * curvature_N) @ features_NF + 1e-12 * np.eye(
            len(weights_F)
        )
        step_F = _lasso_step(hessian_FF, gradient_F, weights_F)
        scale = 1.0
        while scale > 1e-8:
            candidate_F = weights_F + scale * step_F
            candidate = _objective(features_NF, target_N, weight_N, candidate_F, inverse_penalty)
            if candidate <= value:
                break
            scale /= 2
        else:
            break
        converged = value - candidate <= 1e-13 * abs(value)
        weights_F, value = candidate_F, candidate
        if converged:
            break
    return weights_F


def _lasso_step(hessian_FF: Array, gradient_F: Array, weights_F: Array) -> Array:
    """The d that minimises g d + d H d / 2 + ||w + d||_1."""
    step_F = np.zeros_like(weights_F)
    for _ in range(1000):
        largest_change = 0.0
        for f in range(len(step_F)):
            slope = gradient_F[f] + hessian_FF[f] @ step_F
            current = weights_F[f] + step_F[f]
            free = current - slope / hessian_FF[f, f]
            target = math.copysign(max(abs(free) - 1 / hessian_FF[f, f], 0.0), free)
            largest_change = max(largest_change, abs(target - current))
            step_F[f] += target - current
        if largest_change < 1e-12:
            break
    return step_F


def sigmoid(logit: Array) -> Array:
    return np.asarray(np.exp(-np.logaddexp(0, -logit)))


def _objective(
    features_NF: Array, target_N: Array, weight_N: Array, weights_F: Array, inverse_penalty: float
) -> float:
    logit_N = features_NF @ weights_F
    loss_N = np.logaddexp(0, logit_N) - target_N * logit_N
    return float(np.abs(weights_F).sum() + inverse_penalty * (weight_N * loss_N).sum())


def _folds(num_rows: int) -> Array:
    """Fold of each row, as scikit-learn's GroupKFold gives when every row is a group of the same size."""
    order = np.argsort(np.full(num_rows, 2))[::-1]
    folds_N = np.zeros(num_rows)
    folds_N[order] = np.arange(num_rows) % NUM_FOLDS
    return folds_N


def _choose_penalty(features_NF: Array, target_N: Array, weight_N: Array) -> float:
    """The inverse penalty with the lowest held-out log loss, mean over folds."""
    folds_N = _folds(len(target_N))
    losses = []
    for inverse_penalty in PENALTIES:
        fold_losses = []
        for fold in range(NUM_FOLDS):
            train_N, test_N = folds_N != fold, folds_N == fold
            weights_F = fit_logistic_l1(
                features_NF[train_N], target_N[train_N], weight_N[train_N], inverse_penalty=inverse_penalty
            )
            predicted = np.clip(sigmoid(features_NF[test_N] @ weights_F), 1e-15, 1 - 1e-15)
            target = target_N[test_N]
            loss = target * np.log(predicted) + (1 - target) * np.log(1 - predicted)
            fold_losses.append(-float(np.mean(loss * weight_N[test_N])))
        losses.append(sum(fold_losses) / NUM_FOLDS)
    return PENALTIES[int(np.argmin(losses))]


def length_controlled(
    preferences_N: Sequence[float],
    baseline_lengths_N: Sequence[int],
    model_lengths_N: Sequence[int],
    difficulties_N: Sequence[float],
    gamed: Sequence[GamedRow],
) -> LengthControlled:
    """Length-controlled win rate of a model over the whole instruction set, in its order.

    ``preferences_N`` are probabilities (0 to 1) that the model was preferred; NaN rows are left out of the
    fit and still predicted, as in the original. DataError if the lengths never differ.
    """
    preference_N = np.asarray(preferences_N, np.float64)
    delta_N = np.asarray(baseline_lengths_N, np.float64) - np.asarray(model_lengths_N, np.float64)
    if len(delta_N) < 2 or not (spread := float(np.std(delta_N, ddof=1))):
        raise DataError("the lengths of model and baseline never differ, so length cannot be controlled")
    difficulty_N = np.asarray(difficulties_N, np.float64)
    own_NF = np.column_stack([np.tanh(delta_N / spread), difficulty_N, np.ones(len(delta_N))])
    gamed_NF = np.array([[math.tanh(row.std_delta_len), row.difficulty, 0.0] for row in gamed]).reshape(-1, 3)
    features_NF = np.concatenate([gamed_NF, own_NF])
    target_N = np.concatenate([[row.preference for row in gamed], preference_N])
    weight_N = np.concatenate([np.full(len(gamed), GAMED_WEIGHT), np.ones(len(own_NF))])
    is_known_N = ~np.isnan(target_N)
    known = (features_NF[is_known_N], target_N[is_known_N], weight_N[is_known_N])
    inverse_penalty = _choose_penalty(*known)
    weights_F = fit_logistic_l1(*known, inverse_penalty=inverse_penalty)
    predicted_N = sigmoid(weights_F[1] * difficulty_N + weights_F[2])
    return LengthControlled(
        win_rate=100 * float(predicted_N.mean()),
        standard_error=100 * standard_error(predicted_N.tolist()),
        weights=(float(weights_F[0]), float(weights_F[1]), float(weights_F[2])),
        inverse_penalty=inverse_penalty,
    )
