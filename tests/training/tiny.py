"""Tiny real models and samples that the training tests share."""

from __future__ import annotations

import torch

from nemotron4.model.config import ModelConfig
from nemotron4.model.reward_head import RewardModel
from nemotron4.model.transformer import Transformer
from nemotron4.training.packing import Sample, Segment
from nemotron4.training.scorer import LogprobScorer, RewardScorer

VOCABULARY = 61


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


def reward_scorer(num_attributes: int = 3, seed: int = 0) -> RewardScorer:
    net = RewardModel(config(num_reward_attributes=num_attributes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return RewardScorer(net)


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
