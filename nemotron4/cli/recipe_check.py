"""A recipe of stages before it runs: its command lines are parsed, whole stages are rehearsed and counted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from nemotron4.cli.commands import COMMANDS, load_app
from nemotron4.cli.console import print_json
from nemotron4.cluster.goodput import GPU_HOURS_BETWEEN_FAILURES, Failures, Goodput, simulate
from nemotron4.cluster.hardware import gpu_named
from nemotron4.cluster.layout import training_operations
from nemotron4.errors import ConfigError, Nemotron4Error, unknown
from nemotron4.progress import duration
from nemotron4.recipe import Command, CommandStage, Places, StagedRecipe, Volume
from nemotron4.report import Block, Table, Text, print_report

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


GPUS_PER_NODE = 8


@dataclass(frozen=True)
class CheckedStage:
    """A stage whose command lines hold; ``cost`` where the recipe says how much it works on."""

    stage: CommandStage
    reads: list[str]
    cost: Cost | None


def show_dry_run(recipe: StagedRecipe, places: Places, *, slurm: Path | None, as_json: bool) -> None:
    """Check every stage, then print them as one table; ``slurm``: where batch scripts go."""
    checked = [_check(stage, places) for stage in recipe.stage]
    if slurm is not None:
        _write_scripts(checked, places, slurm)
    if as_json:
        print_json({"recipe": recipe.name, "stages": [_json(each, places) for each in checked]})
        return
    is_counted = any(each.cost is not None for each in checked)
    print_report(_cost_blocks(recipe.name, checked) if is_counted else [_plain_table(recipe.name, checked)])


def _check(stage: CommandStage, places: Places) -> CheckedStage:
    cost = None
    for command in (*stage.commands, *([stage.serve] if stage.serve else [])):
        words = places.command(command, stage)
        try:
            if words[0] == "nemotron4":
                path, values = parse(words[1:])
                if stage.volume is not None and cost is None:
                    cost = _cost(path, values, _of_earlier_stages(command, words), stage.volume)
            elif not Path(words[1]).is_file():
                raise ConfigError(f"there is no file {words[1]}")
        except Nemotron4Error as error:
            raise ConfigError(
                f"stage {stage.name}: {' '.join(words)!r}: {error.message}", hint=error.hint
            ) from error
    return CheckedStage(stage, [places.fill(text, stage) for text in places.inputs(stage)], cost)


def _of_earlier_stages(command: Command, words: Sequence[str]) -> set[str]:
    """Words that name what an earlier stage will have made; a rehearsal has the recipe's own file instead."""
    known = ("{recipe}", "{folder}", "{out}", "{url}", "{port}")
    return {
        filled
        for word, filled in zip(command, words, strict=True)
        if "{" in "".join(word.split("{folder}")) and not any(place in word for place in known)
    }


def _cost(path: str, values: dict[str, Any], not_yet: set[str], volume: Volume) -> Cost | None:
    if path == "train":
        return training_cost(Path(values["recipe"]), list(values["overrides"] or []), volume)
    if path == "synth run":
        from nemotron4.synth.recipe import load_recipe

        overrides = [text for text in values["overrides"] or [] if text not in not_yet]
        return synth_cost(load_recipe(values["recipe"], overrides), volume)
    if path == "eval run":
        return served_cost(volume.samples, f"{volume.samples:,} answers", volume)
    return None


def _json(each: CheckedStage, places: Places) -> dict[str, Any]:

    return {
        "stage": each.stage.name,
        "commands": [" ".join(_named(command)) for command in each.stage.commands],
        "reads": each.reads,
        "makes": [places.fill(text, each.stage) for text in each.stage.makes],
        "minutes": each.stage.minutes or None,
        "cost": None if each.cost is None else as_json(each.cost),
    }


def _plain_table(name: str, checked: Sequence[CheckedStage]) -> Table:
    cells = [
        [
            each.stage.name,
            "; ".join(" ".join(_named(command)) for command in each.stage.commands),
            ", ".join(each.reads),
            duration(60 * each.stage.minutes) if each.stage.minutes else "",
        ]
        for each in checked
    ]
    return Table(["stage", "commands", "reads", "expected"], cells, f"{name}: stages")


def _named(command: Sequence[str]) -> list[str]:
    """``train sft.toml`` of a whole command line."""
    return [word.rpartition("/")[2] for word in command[1:4] if not word.startswith("-") and "=" not in word]


def _cost_blocks(name: str, checked: Sequence[CheckedStage]) -> list[Block]:
    """One table of every stage, the formulas, and what failures cost the trained ones."""

    rows, failing = [], []
    for each in checked:
        cost = each.cost
        if cost is None:
            rows.append([each.stage.name, *[""] * 7])
            continue
        state = "" if cost.rank_bytes is None else f"{cost.rank_bytes / 1e9:.1f} GB"
        steps = "" if cost.steps is None else f"{cost.steps:,}"
        rows.append(
            [each.stage.name, cost.data, steps, f"{cost.gpus:,}", state, f"{cost.hours:,.1f}",
             f"{cost.gpu_hours:,.0f}", _bytes(cost.disk_bytes)]
        )  # fmt: skip
        if cost.checkpoint_bytes:
            failing += [_failure_row(each.stage.name, cost, source) for source in GPU_HOURS_BETWEEN_FAILURES]
    total = sum(each.cost.gpu_hours for each in checked if each.cost is not None)
    rows.append(["all", "", "", "", "", "", f"{total:,.0f}", ""])
    columns = ["stage", "data", "steps", "GPUs", "state of a rank", "hours", "GPU hours", "disk"]
    return [
        Table(columns, rows, f"{name}: stages"),
        *(Text(line) for line in FORMULAS),
        Table(
            ["stage", "rate", "failures", "checkpoint every", "goodput", "middle 90 %"],
            failing,
            "failures, 200 simulated runs each",
        ),
    ]


def _failure_row(name: str, cost: Cost, source: str) -> list[str]:
    found = cost.goodput(source)
    span = f"{100 * found.low:.1f} to {100 * found.high:.1f} %"
    return [
        name,
        source,
        f"{found.failures:.1f}",
        duration(found.interval_s),
        f"{100 * found.mean:.1f} %",
        span,
    ]


def _bytes(count: float) -> str:
    return f"{count / 1e12:.2f} TB" if count >= 1e12 else f"{count / 1e9:.1f} GB"


def parse(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The command (``synth run``) and the values of its parameters; ConfigError if the parser refuses it."""
    name, *rest = words
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    parser: Any = typer.main.get_command(load_app(name, COMMANDS[name]))
    path = f"nemotron4 {name}"
    while hasattr(parser, "commands"):
        inner, *rest = rest or [""]
        if inner not in parser.commands:
            raise unknown(f"command of {path}", inner, parser.commands)
        parser, path = parser.commands[inner], f"{path} {inner}"
    try:
        context = parser.make_context(path, rest)
    except typer.TyperException as error:
        raise ConfigError(str(getattr(error, "message", error)), hint=f"see `{path} --help`") from error
    return path.removeprefix("nemotron4 "), context.params


def _write_scripts(checked: Sequence[CheckedStage], places: Places, folder: Path) -> None:
    """A batch script for each stage, and ``submit.sh``, which hands all to sbatch in their order."""
    from nemotron4.cluster.slurm import SlurmJob, stage_script, train_script
    from nemotron4.runs import write_file

    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, each in enumerate(checked, start=1):
        stage, num_gpus = each.stage, 1 if each.cost is None else each.cost.gpus
        job = SlurmJob(
            name=f"{number:02d}-{stage.name}",
            nodes=-(-num_gpus // GPUS_PER_NODE),
            gpus_per_node=min(num_gpus, GPUS_PER_NODE),
            time=f"{1 + math.ceil(1.2 * (0 if each.cost is None else each.cost.hours))}:00:00",
        )
        commands = [places.command(command, stage)[1:] for command in stage.commands]
        if commands[0][0] == "train":
            script = train_script(job, commands[0][1:])
        else:
            serve = places.command(stage.serve, stage)[1:] if stage.serve else []
            script = stage_script(job, serve, commands, health=f"{places.url}/health")
        names.append(f"{job.name}.sbatch")
        write_file(folder / names[-1], script)
    first, *later = names
    lines = ["#!/bin/bash", "set -euo pipefail", 'cd "$(dirname "$0")"', f"job=$(sbatch --parsable {first})"]
    lines += [f'job=$(sbatch --parsable --dependency=afterok:"$job" {name})' for name in later]
    write_file(folder / "submit.sh", "\n".join(lines) + "\n")
