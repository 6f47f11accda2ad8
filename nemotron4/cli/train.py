"""``nemotron4 train``: run a recipe, look at it first, or draw the curves of runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nemotron4.cli.console import note, print_json
from nemotron4.cli.options import JsonOption
from nemotron4.json_form import to_json

if TYPE_CHECKING:
    from nemotron4.report import Block
    from nemotron4.training.preview import Preview
    from nemotron4.training.recipe import Recipe


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file; with --plot a run's folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=VALUE]...", help="Replace settings: optimizer.learning_rate=1e-5."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read and render the data, plan; no step.")
    ] = False,
    invariance: Annotated[
        bool,
        typer.Option("--check-invariance", help="Compare the first gradient under several cuts into rows."),
    ] = False,
    new: Annotated[
        str | None, typer.Option(help="Write a commented recipe of this kind (sft, dpo, ...).")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the curves of one or more runs.")] = False,
    output: Annotated[Path, typer.Option(help="The picture of --plot.")] = Path("curves.png"),
    as_json: JsonOption = False,
) -> None:
    """Train as a recipe says, or continue the run that it started.

    Repeat the command after an interruption. On several processes: torchrun --nproc-per-node N -m nemotron4
    train RECIPE parallel.data=N.
    """
    if plot:
        _plot([recipe, *(overrides or [])], output, as_json=as_json)
        return
    if new is not None:
        from nemotron4.training.new_recipe import new_recipe

        new_recipe(Path(recipe), new, overrides or [])
        print(recipe)
        return
    stages = _load(Path(recipe), overrides or [], needs_files=not dry_run)
    if dry_run:
        _dry_run(stages, as_json=as_json)
    elif invariance:
        _check_invariance(stages[0], as_json=as_json)
    else:
        _train(stages, as_json=as_json)


def _load(path: Path, overrides: list[str], *, needs_files: bool) -> list[Recipe]:
    """The stages of a file; what is wrong with it or missing is told before PyTorch is loaded."""
    from nemotron4 import config
    from nemotron4.errors import Problems
    from nemotron4.training import chain

    values, _ = config.read(path, overrides)
    problems = Problems()
    with problems.kept():
        stages = chain.load(path, overrides)
    for look in _files(values) if needs_files else ():
        with problems.kept():
            look()
    problems.tell()
    return stages


def _files(values: dict[str, Any]) -> Iterator[Callable[[], object]]:
    """Checks that what a recipe's values name is there: the first start, and files of rows."""
    from nemotron4.checkpoint.cache import resolve
    from nemotron4.training.indexed import is_corpus
    from nemotron4.training.reading import HUB, files_of

    model, stages = values.get("model"), values.get("stage")
    if isinstance(model, dict) and isinstance(model.get("start"), str):
        yield partial(resolve, model["start"])
    named: list[object] = []
    for table in (values, *(stages if isinstance(stages, list) else ())):
        data = table.get("data") if isinstance(table, dict) else None
        for group in ("train", "validation"):
            sources = data.get(group) if isinstance(data, dict) else None
            named += sources if isinstance(sources, list) else ()
    for source in named:
        path = source.get("path") if isinstance(source, dict) else source
        if isinstance(path, str) and not path.startswith(HUB) and not is_corpus(path):
            yield partial(files_of, path)


def _plot(runs: list[str], output: Path, *, as_json: bool) -> None:
    from nemotron4.training.plot import plot

    names = plot([Path(run) for run in runs], output)
    if as_json:
        print_json({"picture": str(output), "metrics": names})
    else:
        print(output)


def _dry_run(stages: list[Recipe], *, as_json: bool) -> None:
    from nemotron4.training.preview import preview_all

    found = preview_all(stages)
    if as_json:
        print_json(to_json(found[0]) if len(found) == 1 else {"stages": to_json(found)})
        return
    from nemotron4.report import print_report

    for place, each in enumerate(found):
        print_report(_preview_blocks(each, f"stage {place + 1}" if len(found) > 1 else "stage"))
        if each.first_sample:
            print("first sample, trained stretches between [[ and ]]:")
            print(each.first_sample)


def _preview_blocks(found: Preview, title: str) -> list[Block]:
    from nemotron4.report import Table, Text

    rows = []
    if found.num_samples is not None:
        left_out = f"{found.num_left_out:,} rows left out"
        rows.append(
            (
                "samples",
                f"{found.num_samples:,} to train on, {found.num_validation:,} to validate on, {left_out}",
            )
        )
    if found.tokens_per_epoch is not None:
        share = f"{found.trained_share:.0%} of them trained; the longest sequence has {found.longest:,}"
        rows.append(("tokens", f"{found.tokens_per_epoch:,} per epoch, {share}"))
    steps = "as many as the rows make" if found.num_steps is None else f"{found.num_steps:,}"
    each = f" on each of {found.num_processes} processes" if found.num_processes > 1 else ""
    state = f"{found.optimizer_bytes / 1e9:.2f} GB gradients and AdamW moments{each}; activations come on top"
    rows += [("steps", steps), ("memory", f"{found.weights_bytes / 1e9:.2f} GB weights, {state}")]
    if found.result_bytes is not None:
        rows.append(("result", f"{found.result_bytes / 1e9:.3f} GB in {found.result_dtype}"))
    if found.seconds is not None:
        rows.append(
            ("time", f"{found.seconds / 60:,.1f} minutes at this machine's full matrix-product speed")
        )
    rows += [("note", line) for line in found.notes]
    return [Table((title, found.stage), rows), *map(Text, found.problems)]


def _check_invariance(settings: Recipe, *, as_json: bool) -> None:
    from nemotron4.report import Table, print_report
    from nemotron4.training.preview import check_invariance

    cuts = check_invariance(settings)
    if as_json:
        print_json({"cuts": to_json(cuts)})
        return
    rows = [
        [cut.name, cut.num_rows, f"{cut.loss:.8f}", f"{cut.grad_norm:.8f}", f"{cut.difference:.1e}"]
        for cut in cuts
    ]
    print_report([Table(["first step cut", "rows", "loss", "gradient norm", "difference"], rows)])


def _train(stages: list[Recipe], *, as_json: bool) -> None:
    from nemotron4.cli.training_view import TrainingView
    from nemotron4.training.run_chain import run

    with TrainingView() as view:
        summary = run(stages, note=note, on_progress=view.show, on_part=view.show_part)
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
        _print_samples(summary.directory)
        print(summary.output)


def _print_samples(run: Path) -> None:
    """The first and the last answer to each prompt of the table [samples]."""
    from nemotron4.training.sampler import SAMPLES_FILE

    path = run / SAMPLES_FILE
    if not path.is_file():
        return
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    first, last = min(line["step"] for line in lines), max(line["step"] for line in lines)
    for after in (line for line in lines if line["step"] == last and first < last):
        before = next(line for line in lines if line["step"] == first and line["prompt"] == after["prompt"])
        prompt = after["prompt"]
        note(f"prompt        {prompt if isinstance(prompt, str) else prompt[-1]['content']}")
        note(f"  step {first}: {before['answer'].strip()}")
        note(f"  step {last}: {after['answer'].strip()}")
