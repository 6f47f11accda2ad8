"""``nemotron4 train``: run a recipe, look at it first, or draw the curves of runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import note, print_json
from nemotron4.cli.options import JsonOption

if TYPE_CHECKING:
    from nemotron4.training.recipe import Recipe


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file; with --plot a run's folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME=VALUE]...", help="Settings that replace the file's: optimizer.learning_rate=1e-5."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and render the data, plan, take no step.")
    ] = False,
    invariance: Annotated[
        bool,
        typer.Option(
            "--check-invariance", help="Compare the first step's gradient under several cuts into rows."
        ),
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the curves of one or more runs.")] = False,
    output: Annotated[Path, typer.Option(help="Where --plot writes its picture.")] = Path("curves.png"),
    as_json: JsonOption = False,
) -> None:
    """Train as a recipe says, or continue the run that it started.

    The run's folder receives metrics, checkpoints, the resolved recipe and at the end the model or adapter.
    Repeat the same command after an interruption: the loss curve is the one of an uninterrupted run. On
    several processes: torchrun --nproc-per-node N -m nemotron4 train RECIPE parallel.data=N.
    """
    if plot:
        _plot([recipe, *(overrides or [])], output, as_json=as_json)
        return
    from nemotron4.training import chain

    stages = chain.load(Path(recipe), overrides or [])
    if dry_run:
        _dry_run(stages[0], as_json=as_json)
    elif invariance:
        _check_invariance(stages[0], as_json=as_json)
    else:
        _train(stages, as_json=as_json)


def _plot(runs: list[str], output: Path, *, as_json: bool) -> None:
    from nemotron4.training.plot import plot

    names = plot([Path(run) for run in runs], output)
    if as_json:
        print_json({"picture": str(output), "metrics": names})
    else:
        print(output)


def _dry_run(settings: Recipe, *, as_json: bool) -> None:
    from nemotron4.training.preview import preview

    found = preview(settings)
    if as_json:
        print_json(asdict(found))
        return
    print(
        f"samples      {found.num_samples:,} to train on, {found.num_validation:,} to validate on, "
        f"{found.num_left_out:,} rows left out"
    )
    for problem in found.problems:
        print(f"  {problem}")
    print(
        f"tokens       {found.tokens_per_epoch:,} per epoch, {found.trained_share:.0%} of them trained; "
        f"the longest sequence has {found.longest:,}"
    )
    print(f"steps        {found.num_steps:,}")
    print(
        f"memory       {found.weights_bytes / 1e9:.2f} GB weights, {found.optimizer_bytes / 1e9:.2f} GB "
        "gradients and AdamW moments; activations come on top"
    )
    print(f"time         {found.seconds / 60:,.1f} minutes at this machine's full matrix-product speed")
    print("first sample, trained stretches between [[ and ]]:")
    print(found.first_sample)


def _check_invariance(settings: Recipe, *, as_json: bool) -> None:
    from nemotron4.training.preview import check_invariance

    cuts = check_invariance(settings)
    if as_json:
        print_json({"cuts": [asdict(cut) for cut in cuts]})
        return
    print(f"{'first step cut':<26}{'rows':>6}{'loss':>14}{'gradient norm':>16}{'difference':>12}")
    for cut in cuts:
        print(
            f"{cut.name:<26}{cut.num_rows:>6}{cut.loss:>14.8f}{cut.grad_norm:>16.8f}{cut.difference:>12.1e}"
        )


def _train(stages: list[Recipe], *, as_json: bool) -> None:
    from nemotron4.cli.training_view import TrainingView
    from nemotron4.training.chain import run

    with TrainingView() as view:
        summary = run(
            stages,
            note=note,
            on_progress=view.show,
            on_part=view.show_part,
        )
    if not summary.is_writer:
        return
    if as_json:
        print_json(
            {
                "steps": summary.steps,
                "num_steps": summary.num_steps,
                "output": None if summary.output is None else str(summary.output),
                "run": str(summary.directory),
            }
        )
    elif summary.output is None:
        note(f"stopped after step {summary.steps} of {summary.num_steps}; the same command continues")
    else:
        print(summary.output)
