"""What each process of the policy-gradient tests runs: ``torchrun`` with a JSON file of recipes, in order."""

from __future__ import annotations

import json
import sys
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemotron4.training import parallel, run
from nemotron4.training.recipe import Recipe, build
from nemotron4.training.rewards import connect
from nemotron4.training.rollouts import Answer, RewardVerdict, RolloutBackend


class WorthJudge:
    """A reward in 0..1 that has nothing to do with the model; one answer in seven has none."""

    identity = "worth"

    def __call__(self, answers: Sequence[Answer]) -> list[RewardVerdict]:
        return [_verdict(zlib.crc32(answer.text.strip().encode())) for answer in answers]


def _verdict(number: int) -> RewardVerdict:
    return RewardVerdict(number % 997 / 997) if number % 7 else RewardVerdict(None, "the judge was away")


def judged(recipe: Recipe, base: object) -> RolloutBackend:
    return replace(connect(recipe, base), judge=WorthJudge())  # type: ignore[arg-type]


def train(values: dict[str, Any]) -> None:
    run.train(build(values), connect=judged)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with parallel.launch(torch.device("cpu")):
        for recipe in json.loads(Path(sys.argv[1]).read_text()):
            train(recipe)
