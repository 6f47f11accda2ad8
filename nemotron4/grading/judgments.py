"""What a judge said, and what it makes: MT-Bench ratings, Arena-Hard verdicts and their win rate, AlpacaEval
preferences, and RewardBench's sections.

Every parser returns a Score whose value is the judgment, or says why there is none; a judgment that cannot
be read is never a number. Arena-Hard has a single opponent, so its Bradley-Terry model is saturated: the win
probability is the share of weighted battles won, ties counting half.

B = battles (a game of weight 3 is three battles), R = bootstrap rounds
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nemotron4.grading.score import Score, passed, unscored
from nemotron4.grading.statistics import Interval

_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_RATING_LOOSE = re.compile(r"\[(\d+\.?\d*)\]")
_VERDICT = re.compile(r"\[\[([AB<>=]+)\]\]")

Which = Literal["first", "last"]
RATINGS = tuple(f"Rating: [[{value}]]" for value in range(1, 11))


def rating(judgment: str, which: Which = "last") -> Score:
    """MT-Bench: a number from 1 to 10 in ``[[n]]``, else in ``[n]``.

    FastChat takes the first match; the published Nemotron-4 figures take the last, which differs where the
    judge quotes a rating before giving its own.
    """
    for pattern in (_RATING, _RATING_LOOSE):
        found = pattern.findall(judgment)
        if found:
            value = float(found[-1] if which == "last" else found[0])
            if 1 <= value <= 10:
                return Score(value=value)
            return unscored("rating outside 1 to 10")
    return unscored("no rating")


@dataclass(frozen=True)
class Verdict:
    """One Arena-Hard game seen from the model: weight 3 for ``>>``, else 1; outcome 1, 0.5 or 0."""

    outcome: float
    weight: int


_VERDICTS: Mapping[str, tuple[float, int]] = {  # label -> (share of A, battles)
    "A>>B": (1.0, 3),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "B>A": (0.0, 1),
    "B>>A": (0.0, 3),
}


LABELS = tuple(f"[[{label}]]" for label in _VERDICTS)


def verdict_labels(judgment: str) -> set[str]:
    """Every label in ``[[...]]``; a judge that gave none is asked to finish."""
    return set(_VERDICT.findall(judgment))


def verdict_label(judgment: str) -> Score | str:
    """The one label that all ``[[...]]`` matches agree on."""
    labels = verdict_labels(judgment)
    if not labels:
        return unscored("no verdict")
    if len(labels) > 1:
        return unscored("verdicts disagree")
    label = labels.pop()
    return label if label in _VERDICTS else unscored("unknown verdict label")


def verdict(judgment: str, game: Literal[1, 2]) -> Verdict | Score:
    """The game's outcome for the model (B in game 1, A in game 2), or the unscored Score."""
    label = verdict_label(judgment)
    if isinstance(label, Score):
        return label
    share_a, weight = _VERDICTS[label]
    return Verdict(outcome=share_a if game == 2 else 1.0 - share_a, weight=weight)


def preference(logprobs: Mapping[str, float], model_shown: Literal["m", "M"]) -> Score:
    """AlpacaEval: P(model preferred) in 0..1, from the judge's first-token log-probabilities.

    Only ``m`` (the output shown first) and ``M`` (second) count; one that is missing has probability 0.
    """
    known = {token: float(logprobs[token]) for token in ("m", "M") if token in logprobs}
    if any(math.isnan(value) for value in known.values()):
        return unscored("log-probability is not a number")
    finite = {token: value for token, value in known.items() if math.isfinite(value)}
    if not finite:
        return unscored("no log-probability of m or M")
    highest = max(finite.values())
    weights = {token: math.exp(value - highest) for token, value in finite.items()}
    return Score(value=weights.get(model_shown, 0.0) / sum(weights.values()))


def letter_log_odds(logprobs: Mapping[str, float]) -> Score:
    """ln P(A) - ln P(B), from a judge's first-token log-probabilities; spellings like " A" and "(A" add up.

    A letter that is not listed is no likelier than the least likely token listed, nor than all that is left
    of the probability; the value is then the one nearest to 0. Without either letter there is no judgment.
    """
    found: dict[str, list[float]] = {"A": [], "B": []}
    for token, logprob in logprobs.items():
        letter = token.strip(" \n([*\"'")
        if letter in found and math.isfinite(logprob):
            found[letter].append(logprob)
    if not any(found.values()):
        return unscored("no log-probability of A or B")
    listed = [value for value in logprobs.values() if math.isfinite(value)]
    rest = max(1.0 - sum(math.exp(value) for value in listed), 1e-9)
    floor = min(*listed, math.log(rest))
    log_sums = {name: _log_sum(values) if values else floor for name, values in found.items()}
    return Score(value=log_sums["A"] - log_sums["B"])


def _log_sum(logprobs: Sequence[float]) -> float:
    highest = max(logprobs)
    return highest + math.log(sum(math.exp(value - highest) for value in logprobs))


def stored_preference(value: float) -> Score:
    """The alpaca_eval package's number: 1 baseline, 2 model, 0 or 1.5 a tie; NaN and others are unscored."""
    value = 1.5 if value == 0 else value
    if not 1 <= value <= 2:
        return unscored("preference outside 1 to 2")
    return Score(value=value - 1)


def top_logprobs(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """OpenAI's ``top_logprobs`` list as token -> log-probability."""
    return {str(entry["token"]): float(entry["logprob"]) for entry in entries}


_ELO_PER_LOGIT = 400 / math.log(10)


def battles(verdicts: Sequence[Verdict]) -> list[float]:
    """Outcomes for the model, each repeated by its weight, in the order of the games."""
    return [verdict.outcome for verdict in verdicts for _ in range(verdict.weight)]


def win_rate(outcomes_B: Sequence[float]) -> float:
    """100 (W + T/2) / N; NaN without battles."""
    return 100 * sum(outcomes_B) / len(outcomes_B) if outcomes_B else math.nan


def battle_interval(outcomes_B: Sequence[float], *, rounds: int = 100, seed: int = 42) -> Interval:
    """The benchmark's own interval: battles drawn again, percentiles taken of the Elo ratings.

    The draws are those of the official code (``np.random.seed(42)``, ``DataFrame.sample``). It ignores that
    the games of one question agree; the bootstrap over questions does not.
    """
    method = f"bootstrap over {len(outcomes_B)} battles, {rounds} rounds, seed {seed} (official)"
    if not outcomes_B:
        return Interval(math.nan, math.nan, method)
    outcomes = np.asarray(outcomes_B, np.float64)
    generator = np.random.RandomState(seed)
    drawn = [generator.choice(len(outcomes), size=len(outcomes), replace=True) for _ in range(rounds)]
    shares_R = np.clip([outcomes[rows].mean() for rows in drawn], 1e-9, 1 - 1e-9)
    ratings_R = _ELO_PER_LOGIT * np.log(shares_R / (1 - shares_R))
    lower, upper = (_win_probability(float(np.percentile(ratings_R, level))) for level in (2.5, 97.5))
    return Interval(100 * lower, 100 * upper, method)


def _win_probability(rating: float) -> float:
    return 1 / (1 + math.exp(-rating / _ELO_PER_LOGIT))


SECTIONS: Mapping[str, Mapping[str, int]] = {
    "chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "chat_hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 250,
        "xstest-should-respond": 154,
        "donotanswer": 136,
    },
    "reasoning": {
        "math-prm": 984,
        "hep-cpp": 164,
        "hep-go": 164,
        "hep-java": 164,
        "hep-js": 164,
        "hep-python": 164,
        "hep-rust": 164,
    },
}
PRIOR_SETS = ("anthropic_helpful", "anthropic_hhh", "shp", "summarize")


def prefers_chosen(chosen_reward: float, rejected_reward: float) -> Score:
    """1 if the chosen answer has the higher reward; a tie is wrong, a NaN is unscored."""
    if math.isnan(chosen_reward) or math.isnan(rejected_reward):
        return unscored("reward is not a number")
    return passed(chosen_reward > rejected_reward)


def section_scores(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Sections and overall in percent from subset accuracies (0 to 1); NaN where a subset is missing."""
    scores = {}
    for section, counts in SECTIONS.items():
        total = sum(count * accuracies.get(subset, math.nan) for subset, count in counts.items())
        scores[section] = 100 * total / sum(counts.values())
    scores["overall"] = sum(scores[section] for section in SECTIONS) / len(SECTIONS)
    if any(subset in accuracies for subset in PRIOR_SETS):
        prior = [accuracies.get(subset, math.nan) for subset in PRIOR_SETS]
        scores["prior_sets"] = 100 * sum(prior) / len(prior)
    return scores
