"""Tiny real models and samples that the training tests share."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from nemotron4.model.config import ModelConfig
from nemotron4.model.reward_head import RewardModel
from nemotron4.model.transformer import Transformer
from nemotron4.training import checkpoints
from nemotron4.training.dataset import Dataset
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.metrics import StepRecord
from nemotron4.training.objectives import LikelihoodObjective
from nemotron4.training.recipe import (
    BatchSection,
    OptimizerSection,
    ParallelSection,
    Recipe,
    RunSection,
    build,
)
from nemotron4.training.samples import Sample, Segment
from nemotron4.training.scorer import AttributeScorer, LogprobScorer, Scorer
from nemotron4.training.stage import Objective
from nemotron4.training.trainer import Trainer

VOCABULARY = 64


def config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "vocab_size": VOCABULARY, "context_length": 64, "init_std": 0.2,
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]


def logprob_scorer(seed: int = 0, **changes: object) -> LogprobScorer:
    net = Transformer(config(**changes))
    net.initialise(seed=seed)
    return LogprobScorer(net)


def reward_scorer(num_attributes: int = 3, seed: int = 0, **changes: object) -> AttributeScorer:
    net = RewardModel(config(num_reward_attributes=num_attributes, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return AttributeScorer(net)


def segment(generator: torch.Generator, *, low: int = 3, high: int = 12) -> Segment:
    """Random tokens; the first third is a prompt."""
    length = int(torch.randint(low, high, (1,), generator=generator))
    tokens = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
    return Segment(tuple(tokens), tuple(i >= max(1, length // 3) for i in range(length)))


def texts(num: int, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [Sample((segment(generator),), where=f"texts.jsonl:{i + 1}") for i in range(num)]


def pairs(num: int, seed: int = 0, *, with_reference: bool = True) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(num):
        numbers = torch.randn(4, generator=generator).tolist()
        made.append(
            Sample(
                (segment(generator), segment(generator)),
                labels=(numbers[0], numbers[1]),
                reference=(-20 + numbers[2], -21 + numbers[3]) if with_reference else (),
                where=f"pairs.jsonl:{i + 1}",
            )
        )
    return made


def shared_pairs(num: int, seed: int = 0) -> list[Sample]:
    """Pairs of two answers to one prompt that is long enough to be computed once for both."""
    made = []
    for i, pair in enumerate(pairs(num, seed)):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        prompt = tuple(torch.randint(VOCABULARY, (17,), generator=generator).tolist())
        segments = tuple(
            Segment((*prompt, *each.tokens[-8:]), (*[False] * 17, *[True] * len(each.tokens[-8:])))
            for each in pair.segments
        )
        made.append(dataclasses.replace(pair, segments=segments))
    return made


def judged(num: int, seed: int = 0) -> list[Sample]:
    return [
        Sample(pair.segments, labels=(float(i % 2),), reference=pair.reference, where=pair.where)
        for i, pair in enumerate(pairs(num, seed))
    ]


def scored(num: int, num_attributes: int = 3, seed: int = 0) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(num):
        labels = torch.randn(num_attributes, generator=generator).tolist()
        labels[i % num_attributes] = -100.0
        made.append(Sample((segment(generator),), labels=tuple(labels), where=f"scored.jsonl:{i + 1}"))
    return made


def dataset(
    samples: list[Sample], *, source_sizes: tuple[int, ...] = (), weights: tuple[float, ...] = ()
) -> Dataset:
    return Dataset(samples, seed=3, source_sizes=source_sizes, weights=weights)


def make_recipe(folder: Path, **settings: object) -> Recipe:
    """A recipe for samples in memory; settings go to the section that has them."""
    values: dict[str, dict[str, object]] = {
        "model": {"preset": "nano", "tokenizer": "none"},
        "data": {"train": ["none.jsonl"], "max_length": 40},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "run": {"directory": str(folder), "save_every": 2, "max_steps": 3},
        "batch": {"global_size": 4, "row_tokens": 40},
    }
    for name, value in settings.items():
        kinds = (OptimizerSection, RunSection, BatchSection, ParallelSection)
        for section, kind in zip(("optimizer", "run", "batch", "parallel"), kinds, strict=True):
            if name in {field.name for field in dataclasses.fields(kind)}:
                values.setdefault(section, {})[name] = value
    return build({"stage": "sft", **values})


def make_trainer(
    folder: Path,
    *,
    scorer: Scorer | None = None,
    stage: Objective | None = None,
    samples: list[Sample] | None = None,
    fingerprint: str = "run",
    on_progress: Callable[[StepRecord], None] = lambda progress: None,
    **settings: object,
) -> Trainer:
    return Trainer(
        make_recipe(folder, **settings),
        TrainingEngine(scorer or logprob_scorer()),
        stage or LikelihoodObjective(),
        dataset(samples or texts(11)),
        texts(3, seed=9) if samples is None else (),
        fingerprint=fingerprint,
        on_progress=on_progress,
    )


def run_until_killed(folder: Path, moment: str) -> None:
    """Train, and die by SIGKILL in the middle of a step or of a save."""
    trainer = make_trainer(folder, max_steps=8)
    die = partial(os.kill, os.getpid(), signal.SIGKILL)
    if moment == "step":
        trainer.on_progress = lambda p: die() if p.step == 5 else None
    else:
        write = checkpoints.save_tensors

        def write_then_die(*arguments: object, **settings: object) -> None:
            write(*arguments, **settings)  # type: ignore[arg-type]
            if list(folder.glob("checkpoints/.partial-step-00000006")):
                die()

        checkpoints.save_tensors = write_then_die  # type: ignore[assignment]
    trainer.run()
