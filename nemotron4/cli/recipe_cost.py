"""What a stage of a recipe costs when it is run whole: steps, GPUs, hours, disk; by rehearsal and planner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemotron4.cluster.goodput import GPU_HOURS_BETWEEN_FAILURES, Failures, Goodput, simulate
from nemotron4.cluster.hardware import gpu_named
from nemotron4.cluster.layout import training_operations
from nemotron4.errors import ConfigError
from nemotron4.recipe import Volume

if TYPE_CHECKING:
    from nemotron4.synth.recipe import SynthRecipe
    from nemotron4.training.recipe import Recipe
    from nemotron4.training.rehearsal import Rehearsed

FORMULAS = (
    "training: hours = passes * 3 * (2*T*(P_nonemb + V*d) + 4*B*s^2*d*L) / (GPUs * peak * efficiency * 3600),"
    " T = B*s tokens in windows of s; passes 4/3 with a frozen reference, else 1",
    "a served model: hours = samples * new tokens / (the planner's tokens/s * efficiency * 3600)",
    "disk: kept checkpoints * 12 bytes a trained number + 2 bytes a number of the result;"
    " 6 bytes a token written",
)
BYTES_PER_TOKEN = 6  # of a row in the ledger and in the export, with its prompt
NODE_BYTES_PER_S, FILE_SYSTEM_BYTES_PER_S = 2e9, 100e9  # of a checkpoint; ours
RESTART_S = 600.0  # from a failure to the next step: notice, reschedule, load; ours
CONCURRENCY = 64


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one command. ``steps`` is None where nothing is trained."""

    data: str
    steps: int | None
    gpus: int
    hours: float
    disk_bytes: float
    rank_bytes: int | None = None
    checkpoint_bytes: int = 0

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.hours

    def goodput(self, source: str) -> Goodput:
        """With the published rate of failures of that name."""
        speed = min(FILE_SYSTEM_BYTES_PER_S, NODE_BYTES_PER_S * max(1, self.gpus // 8))
        rate = GPU_HOURS_BETWEEN_FAILURES[source]
        failures = Failures(
            gpu_hours_between=rate, write_s=self.checkpoint_bytes / speed, restart_s=RESTART_S
        )
        return simulate(failures, self.gpus, 3600 * self.hours)


def training_cost(recipe: Path, overrides: list[str], volume: Volume) -> Cost:
    """Every stage of the file on fake groups of its processes; refused where steps and samples disagree."""
    from nemotron4.training import chain
    from nemotron4.training.rehearsal import rehearse

    stages = chain.load(recipe, overrides)
    if len(stages) > 1 and any(stage.run.max_steps is None for stage in stages):
        raise ConfigError(f"{recipe}: the stages of a chain need run.max_steps to be counted")
    found = [rehearse(stage, volume.samples) for stage in stages]
    seen = sum(each.num_samples for each in found)
    wanted = volume.samples * (stages[0].run.epochs or 1)
    if abs(seen - wanted) >= max(each.largest_step for each in found):
        raise ConfigError(
            f"{recipe}: its steps take {seen:,} samples, and the stage's volume says {wanted:,}",
            hint="mend volume.samples of the stage or run.max_steps",
        )
    hours = sum(_hours(stage, each, volume) for stage, each in zip(stages, found, strict=True))
    last, rehearsed = stages[-1], found[-1]
    kept = max(stage.run.keep_checkpoints for stage in stages)
    return Cost(
        data=f"{volume.samples:,} samples" + (f" x {last.run.epochs}" if (last.run.epochs or 1) > 1 else ""),
        steps=sum(each.num_steps for each in found),
        gpus=rehearsed.num_processes,
        hours=hours,
        disk_bytes=kept * rehearsed.checkpoint_bytes + _result_bytes(stages, rehearsed),
        rank_bytes=max(each.largest_bytes for each in found),
        checkpoint_bytes=rehearsed.checkpoint_bytes,
    )


def _result_bytes(stages: Sequence[Recipe], rehearsed: Rehearsed) -> float:
    """Of the models that the stages leave; a start that is not here counts as 16 bits."""
    wide = sum(4 if stage.run.result_dtype == "float32" else 2 for stage in stages)
    return wide * rehearsed.config.num_parameters


def _hours(recipe: Recipe, rehearsed: Rehearsed, volume: Volume) -> float:
    window = recipe.data.max_length
    num_windows = rehearsed.num_samples * volume.tokens / window
    passes = 4 / 3 if recipe.stage == "preference" else 1.0
    operations = passes * training_operations(rehearsed.config, batch=1, context=window) * num_windows
    peak = gpu_named(volume.gpu).rate("bf16") or math.nan
    return operations / (rehearsed.num_processes * peak * volume.efficiency * 3600)


def served_cost(samples: float, data: str, volume: Volume) -> Cost:
    """A served model writes ``volume.tokens`` new tokens for each sample, 64 at a time."""
    from nemotron4.cli.plan import planned_model
    from nemotron4.cluster.plan import Workload, make_plan

    planned = planned_model(volume.model)
    workload = Workload(context=planned.shape.context_length, concurrency=CONCURRENCY)
    plan = make_plan(planned.shape, gpu_named(volume.gpu), workload)
    if plan.rates is None:
        raise ConfigError(f"{volume.gpu} has no known bandwidth: the hours of {volume.model} are unknown")
    tokens = samples * volume.tokens
    seconds = tokens / (plan.rates.decode_tokens_per_s * volume.efficiency)
    return Cost(
        data=data, steps=None, gpus=plan.layout.num_gpus, hours=seconds / 3600,
        disk_bytes=tokens * BYTES_PER_TOKEN,
    )  # fmt: skip


def synth_cost(recipe: SynthRecipe, volume: Volume) -> Cost:
    """The calls of the plan, so many times that the export has the samples; checks the whole recipe."""
    from nemotron4.synth.accounting import make_plan
    from nemotron4.synth.check import check

    planned = make_plan(recipe, check(recipe).stages)
    rows: Mapping[str, float] = {stage.name: stage.rows_out for stage in planned.stages}
    export = recipe.export
    made = sum(rows[name] for name in export.preference or export.sft or export.stages)
    factor = volume.samples / made
    answered = [stage for stage in planned.stages if stage.tokens_out]
    calls = factor * sum(stage.calls for stage in answered)
    tokens = factor * sum(stage.tokens_out for stage in answered) / calls
    per_call = replace(volume, tokens=max(1, round(tokens)))
    return served_cost(calls, f"{volume.samples:,} rows, {calls:,.0f} calls", per_call)


def as_json(cost: Cost) -> dict[str, Any]:
    return {
        "data": cost.data,
        "steps": cost.steps,
        "gpus": cost.gpus,
        "hours": round(cost.hours, 2),
        "gpu_hours": round(cost.gpu_hours),
        "disk_bytes": round(cost.disk_bytes),
        "state_bytes_per_rank": cost.rank_bytes,
    }
