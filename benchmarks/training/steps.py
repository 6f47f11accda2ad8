"""Single steps of our trainer at 124.7 M parameters, one way of doing them beside another, taking turns.

    python benchmarks/training/steps.py shared     # DPO: prompts of 1,000 tokens, two answers of 200
    python benchmarks/training/steps.py bfloat16   # windows of 512, float32 beside bfloat16

Random weights and tokens; a step is gradients, clipping and AdamW. The figure is the ratio of the median
seconds of each way: of the processor's where OMP_NUM_THREADS is 1, which other programs disturb less, else of
the clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from nemotron4.model.config import ModelConfig
from nemotron4.model.transformer import Transformer
from nemotron4.training import parallel
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.objectives import LikelihoodObjective, PairObjective
from nemotron4.training.optimizer import apply_gradients, build_optimizer
from nemotron4.training.packing import PackedRow, pack
from nemotron4.training.preference_settings import PreferenceSection
from nemotron4.training.recipe import OptimizerSection, ParallelSection
from nemotron4.training.samples import Sample, Segment
from nemotron4.training.scorer import LogprobScorer
from nemotron4.training.stage import Objective

CONFIG = ModelConfig(
    num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_heads=12, num_kv_heads=4, head_dim=64,
    vocab_size=32000, context_length=4096,
)  # fmt: skip
CPU = torch.device("cpu")


def new_engine(compute: str) -> TrainingEngine:
    """The engine that a run with this ``model.compute`` has; its process group stays until the end."""
    group = parallel.process_group(ParallelSection(), CPU)
    grid = group.__enter__()
    net = Transformer(CONFIG)
    net.initialise(seed=0)
    engine = parallel.distribute(LogprobScorer(net), grid, CPU, compute=getattr(torch, compute))
    engine.group = group  # type: ignore[attr-defined]
    return engine


def ids(num: int) -> tuple[int, ...]:
    return tuple(torch.randint(CONFIG.vocab_size, (num,)).tolist())


def pairs(num: int) -> list[Sample]:
    made = []
    for _ in range(num):
        prompt = ids(1000)
        segments = [Segment((*prompt, *ids(200)), (*[False] * 1000, *[True] * 200)) for _ in range(2)]
        made.append(Sample(tuple(segments), reference=(-2000.0, -2000.0)))
    return made


def windows(num: int) -> list[Sample]:
    return [Sample((Segment(ids(512), (True,) * 512),)) for _ in range(num)]


def step(
    engine: TrainingEngine, optimizer: torch.optim.Optimizer, objective: Objective, rows: Sequence[PackedRow]
) -> None:
    engine.forward_backward(rows, objective)
    apply_gradients(engine, optimizer, engine.grad_norm(), 1e-5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("case", choices=("shared", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, help="of a step (shared: 2 pairs, bfloat16: 8 windows)")
    options = parser.parse_args()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    torch.manual_seed(0)
    settings = OptimizerSection(learning_rate=1e-5)
    ways: dict[str, Callable[[], None]] = {}
    if options.case == "shared":
        engine, samples = new_engine("float32"), pairs(options.samples or 2)
        optimizer = build_optimizer(engine.trainable, settings)
        objective = PairObjective(PreferenceSection(loss="dpo", beta=0.1))
        for name, shares in (("apart", False), ("shared", True)):
            rows = [pack([sample], shares=shares) for sample in samples]
            ways[name] = partial(step, engine, optimizer, objective, rows)
    else:
        samples = windows(options.samples or 8)
        for name in ("float32", "bfloat16"):
            engine = new_engine(name)
            optimizer = build_optimizer(engine.trainable, settings)
            ways[name] = partial(step, engine, optimizer, LikelihoodObjective(), engine.rows(samples, 2048))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    num_tokens = sum(sample.num_tokens for sample in samples)
    for number in range(options.rounds + 1):
        for name, run in ways.items():
            started = clock()
            run()
            if number:  # the first step meets fresh memory
                seconds[name].append(clock() - started)
    for name, found in seconds.items():
        median = statistics.median(found)
        each = ", ".join(f"{value:.2f}" for value in found)
        print(f"{name}: {median:.2f} s a step ({each}), {num_tokens / median:,.0f} tokens/s")
    first, second = (statistics.median(found) for found in seconds.values())
    print(f"ratio {first / second:.2f}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
