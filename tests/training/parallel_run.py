"""What each process of the parallel tests runs: a few steps on a layout, written down for comparison.

Started by ``torchrun`` with: output file, case name, data, tensor, pipeline, steps, folder, adapter.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nemotron4.model.adapters import AdapterConfig, add_adapter
from nemotron4.training.engine import Engine
from nemotron4.training.parallel import distribute, num_processes, process_group
from nemotron4.training.recipe import ParallelSection, PreferenceSection
from nemotron4.training.scorer import Scorer
from nemotron4.training.stages.interface import Stage
from nemotron4.training.stages.preference import PairStage
from nemotron4.training.stages.reward import RegressionStage
from nemotron4.training.stages.sft import LikelihoodStage
from nemotron4.training.trainer import Trainer
from tests.training import tiny

CASES: dict[str, tuple[Stage, str]] = {
    "sft": (LikelihoodStage(), "texts"),
    "reward": (RegressionStage(("a", "b", "c")), "scored"),
    "dpo": (PairStage(PreferenceSection(loss="dpo", beta=0.3)), "pairs"),
    "rpo": (PairStage(PreferenceSection(loss="rpo", beta=0.3, sft_weight=0.1)), "pairs"),
}


def build(case: str, adapter: str) -> Scorer:
    scorer = tiny.reward_scorer() if case == "reward" else tiny.logprob_scorer(num_layers=4)
    if adapter != "none":
        add_adapter(scorer.net, AdapterConfig(kind=adapter, rank=4, targets=("all",)), seed=0)  # type: ignore[arg-type]
        if case == "reward":
            scorer.net.reward_head.requires_grad_(True)
    return scorer


def train(engine: Engine, case: str, folder: Path, steps: int, num_rows: int = 11) -> Trainer:
    stage, maker = CASES[case]
    # Adam divides a gradient that is 0 but for rounding by itself: a larger eps keeps that noise small.
    recipe = tiny.make_recipe(
        folder, max_steps=6, save_every=3, global_size=5, learning_rate=1e-2, eps=1e-5, validate_every=2
    )
    engine.score(engine.rows(getattr(tiny, maker)(3), 40)[0])  # as the reference is computed before training
    trainer = Trainer(
        recipe, engine, stage, tiny.dataset(getattr(tiny, maker)(num_rows)),
        getattr(tiny, maker)(3, seed=9), is_writer=not dist.is_initialized() or dist.get_rank() == 0,
    )  # fmt: skip
    trainer.on_progress = lambda p: trainer.stop_requested.set() if p.step == steps else None
    trainer.run()
    return trainer


def full_weights(engine: Engine) -> dict[str, list[float]]:
    """Every trained parameter, gathered, as plain numbers."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten().tolist()
        for name, p in engine.trainable.items()
    }


def main() -> None:
    out, case, data, tensor, pipeline, steps, folder, adapter = sys.argv[1:]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    settings = ParallelSection(data=int(data), tensor=int(tensor), pipeline=int(pipeline))
    device = torch.device("cpu")
    with process_group(settings, device) as mesh:
        scorer = build(case, adapter)
        engine = Engine(scorer) if mesh is None else distribute(scorer, mesh, device)
        train(engine, case, Path(folder), int(steps))
        weights = full_weights(engine)
        if num_processes() > 1:
            gathered: list[dict[str, list[float]] | None] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, weights)
            weights = {name: values for part in gathered if part for name, values in part.items()}
        if not dist.is_initialized() or dist.get_rank() == 0:
            Path(out).write_text(json.dumps(weights))


if __name__ == "__main__":
    main()
