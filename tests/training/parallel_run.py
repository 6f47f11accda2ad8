"""What each process of the parallel tests runs: a few steps of several cases, written down for comparison.

Started by ``torchrun`` with one argument, a JSON file with a list of ``Case``s; each leaves its weights in
``weights.json`` of its folder.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nemotron4.errors import TrainingError
from nemotron4.model.adapter_config import AdapterConfig
from nemotron4.model.adapters import add_adapter
from nemotron4.training.engine import TrainingEngine
from nemotron4.training.objectives import (
    JudgedObjective,
    LikelihoodObjective,
    PairObjective,
    RegressionObjective,
)
from nemotron4.training.parallel import build_grid, distribute, process_group
from nemotron4.training.preference_settings import PreferenceSection
from nemotron4.training.recipe import ParallelSection
from nemotron4.training.run import stopping_on_sigterm
from nemotron4.training.scorer import Scorer, checkpoint_activations
from nemotron4.training.stage import Objective
from nemotron4.training.trainer import StepRecord, Trainer
from tests.training import tiny

STAGES: dict[str, tuple[Objective, str]] = {
    "sft": (LikelihoodObjective(), "texts"),
    "reward": (RegressionObjective(("a", "b", "c")), "scored"),
    "dpo": (PairObjective(PreferenceSection(loss="dpo", beta=0.3)), "pairs"),
    "rpo": (PairObjective(PreferenceSection(loss="rpo", beta=0.3, sft_weight=0.1)), "shared_pairs"),
    "kto": (JudgedObjective(PreferenceSection(loss="kto", beta=0.3)), "judged"),
}


@dataclass(frozen=True)
class Case:
    """One training of a tiny model under a layout."""

    folder: str
    stage: str = "sft"
    adapter: str = "none"
    tied: bool = False
    recompute: bool = False
    data: int = 1
    replicas: int = 1
    tensor: int = 1
    pipeline: int = 1
    steps: int = 6  # stop after; the run is planned for 6
    fault: str = ""  # sigterm: the last process gets it in step 2; nan: the loss of one row is not finite

    @property
    def layout(self) -> ParallelSection:
        return ParallelSection(
            data=self.data, replicas=self.replicas, tensor=self.tensor, pipeline=self.pipeline
        )


def build(case: Case) -> Scorer:
    shape = {"num_layers": 4, "tie_embeddings": case.tied}
    scorer = tiny.reward_scorer(**shape) if case.stage == "reward" else tiny.logprob_scorer(**shape)
    if case.adapter != "none":
        add_adapter(scorer.net, AdapterConfig(kind=case.adapter, rank=4, targets=("all",)), seed=0)  # type: ignore[arg-type]
        if case.stage == "reward":
            scorer.net.reward_head.requires_grad_(True)
    if case.recompute:
        checkpoint_activations(scorer.net.model)
    return scorer


def run(case: Case) -> None:
    """Train, and leave metrics, checkpoints, ``weights.json`` and how each process ended in the folder."""
    device = torch.device("cpu")
    scorer = build(case)
    is_single = case.layout.num_processes == 1
    engine = (
        TrainingEngine(scorer) if is_single else distribute(scorer, build_grid(case.layout, "cpu"), device)
    )
    end: int | str
    try:
        end = train(engine, case)
    except TrainingError as error:
        end = error.message
    mine: dict[str, Any] = {"end": end, "weights": full_weights(engine)}
    parts = [mine]
    if not is_single:
        parts = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, mine)
    if is_single or dist.get_rank() == 0:
        merged = {name: values for part in parts for name, values in part["weights"].items()}
        (Path(case.folder) / "weights.json").write_text(json.dumps(merged))
        (Path(case.folder) / f"end{case.fault}.json").write_text(json.dumps([part["end"] for part in parts]))


def train(engine: TrainingEngine, case: Case, num_rows: int = 11) -> int:
    """Run the trainer; the steps done."""
    stage, maker = STAGES[case.stage]
    rows = getattr(tiny, maker)(num_rows)
    if case.fault == "nan":
        rows = [replace(row, reference=(math.nan, 0.0)) if i == 7 else row for i, row in enumerate(rows)]
    # Adam divides a gradient that is 0 but for rounding by itself. The eps of NVIDIA's pre-training recipe
    # keeps that noise from moving a weight by a whole step.
    recipe = tiny.make_recipe(
        Path(case.folder), max_steps=6, save_every=3, global_size=5, learning_rate=1e-4, eps=1e-5,
        validate_every=2,
    )  # fmt: skip
    engine.score(engine.rows(getattr(tiny, maker)(3), 40)[0])  # as the reference is computed before training
    trainer = Trainer(
        recipe, engine, stage, tiny.dataset(rows),
        getattr(tiny, maker)(3, seed=9), is_writer=not dist.is_initialized() or dist.get_rank() == 0,
    )  # fmt: skip
    is_last = dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1

    def on_progress(progress: StepRecord) -> None:
        if progress.step == case.steps:
            trainer.stop_requested.set()
        if progress.step == 2 and case.fault == "sigterm" and is_last:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.on_progress = on_progress
    with stopping_on_sigterm(trainer):
        return trainer.run()


def full_weights(engine: TrainingEngine) -> dict[str, list[float]]:
    """Every trained parameter that this process has a part of, gathered, as plain numbers."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten().tolist()
        for name, p in engine.trainable.items()
    }


def write_cases(path: Path, cases: list[Case]) -> None:
    path.write_text(json.dumps([asdict(case) for case in cases]))


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = [Case(**values) for values in json.loads(Path(sys.argv[1]).read_text())]
    with process_group(cases[0].layout, torch.device("cpu")):
        for case in cases:
            run(case)
            if dist.get_rank() == 0:
                print("done", case, flush=True)


if __name__ == "__main__":
    main()
