"""``nemotron4 synth``: make training data with a recipe; every command works on the folder of a run."""

from __future__ import annotations

import json
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nemotron4.cli.console import PAGE_PORT, PortOption, group, note, present, print_json, serve_page
from nemotron4.cli.options import FolderArgument, JsonOption, RunFolderOption, SetOption

if TYPE_CHECKING:
    from nemotron4.client import ChatModel
    from nemotron4.synth.recipe import SynthRecipe

Executor = Literal["local", "ray"]
STDERR = 2

app = group(
    "Make synthetic training data: prompts, answers, judged pairs. A run survives kill -9: repeat it."
)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]


def _load(recipe: Path, overrides: list[str] | None) -> SynthRecipe:
    from nemotron4.synth.recipe import load_recipe

    return load_recipe(recipe, overrides or [])


@app.command()
def run(
    recipe: RecipeArgument,
    out: RunFolderOption,
    overrides: SetOption = None,
    shard: Annotated[str, typer.Option(metavar="INDEX/NUMBER", help="One shard of a larger job.")] = "0/1",
    workers: Annotated[int, typer.Option(help="Shards at a time, merged at the end.")] = 1,
    executor: Annotated[Executor, typer.Option(help="Processes here, or tasks of Ray.")] = "local",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no accounting.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Start a run, or continue it, also with a changed recipe."""
    from nemotron4.progress import Progress
    from nemotron4.synth.execute import parse_shard, run_recipe
    from nemotron4.synth.shards import run_shards

    loaded = _load(recipe, overrides)
    with nullcontext() if quiet else Progress(None, name=loaded.name) as progress:
        if workers > 1 or executor != "local":
            outcome = run_shards(loaded, out, workers, executor=executor, progress=progress)
        else:
            models = _local_models(loaded)
            outcome = run_recipe(loaded, out, models=models, shard=parse_shard(shard), progress=progress)
    if as_json:
        print_json({"ending": outcome.ending, "reason": outcome.reason, "seconds": outcome.seconds,
                    "calls": outcome.calls, "accounting": _accounting(out).to_json()})  # fmt: skip
    elif not quiet:
        note(f"{outcome.ending}: {outcome.reason} ({outcome.calls} calls in {outcome.seconds:.1f} s)")
        _print_accounting(out)
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)
    if outcome.is_target_missed:
        raise typer.Exit(1)


def _local_models(recipe: SynthRecipe) -> dict[str, ChatModel]:
    """The models of ``local`` endpoints, loaded into this process once the recipe is known to work."""
    names = {name: each.model for name, each in recipe.endpoint.items() if each.form == "local"}
    if not names:
        return {}
    from nemotron4.client import EngineChatModel
    from nemotron4.inference.load import load
    from nemotron4.synth.check import check

    check(recipe)
    return {name: EngineChatModel(load(model), name=model) for name, model in names.items()}


def _accounting(folder: Path) -> Any:
    from nemotron4.synth.accounting import read_accounting
    from nemotron4.synth.ledger import Reader
    from nemotron4.synth.recipe import LEDGER, load_saved_recipe

    with Reader(folder / LEDGER) as ledger:
        return read_accounting(ledger, load_saved_recipe(folder))


def _print_accounting(folder: Path) -> None:
    from nemotron4.report import print_report
    from nemotron4.synth.accounting import accounting_blocks

    print_report(accounting_blocks(_accounting(folder)))


@app.command()
def status(
    folder: FolderArgument,
    failures: Annotated[int, typer.Option(help="So many failures with reasons.")] = 0,
    dropped: Annotated[int, typer.Option(help="So many examples of what each filter dropped.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Show the accounting of a run, also while it runs."""
    from nemotron4.report import print_report
    from nemotron4.synth.accounting import dropped_blocks, read_dropped
    from nemotron4.synth.ledger import Reader
    from nemotron4.synth.recipe import LEDGER, load_saved_recipe

    accounting = _accounting(folder)
    with Reader(folder / LEDGER) as ledger:
        failed = ledger.failures(failures)
        stages = [stage.name for stage in load_saved_recipe(folder).stage]
        left_out = read_dropped(ledger, stages, dropped) if dropped else []
    if as_json:
        more = {"dropped": [rule.to_json() for rule in left_out]} if dropped else {}
        print_json(accounting.to_json() | more)
    else:
        _print_accounting(folder)
        if left_out:
            print_report(dropped_blocks(left_out))
    for stage, record, kind, reason in failed:
        note(f"{record.hex()[:12]} {stage}: {kind}: {reason}")


@app.command()
def preview(
    recipe: RecipeArgument,
    number: Annotated[int, typer.Option("-n", "--number", help="Records that each stage works on.")] = 5,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a few records through every stage and keep nothing."""
    from nemotron4.synth.execute import run_recipe
    from nemotron4.synth.ledger import Reader
    from nemotron4.synth.recipe import LEDGER

    loaded = _load(recipe, overrides)
    with tempfile.TemporaryDirectory(prefix="nemotron4-preview-") as name:
        folder = Path(name)
        run_recipe(loaded, folder, models=_local_models(loaded), stage_limit=number)
        shown: dict[str, Any] = {}
        with Reader(folder / LEDGER) as ledger:
            for stage in loaded.stage:
                record = next(ledger.records_of(stage.name), None)
                shown[stage.name] = None if record is None else ledger.payload(record)
        if as_json:
            print_json({"rows": shown, "accounting": _accounting(folder).to_json()})
            return
        for stage_name, row in shown.items():
            print(f"--- {stage_name}")
            print("(no row)" if row is None else json.dumps(row, indent=1, ensure_ascii=False))
        _print_accounting(folder)


@app.command()
def plan(
    recipe: RecipeArgument,
    like: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A run whose rates, tokens and yields apply.")
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate calls, tokens, money and time of a recipe."""
    from nemotron4.synth.accounting import make_plan, plan_blocks
    from nemotron4.synth.check import check, check_keys

    loaded = _load(recipe, overrides)
    pipeline = check(loaded)
    check_keys(loaded)
    for line in pipeline.notes:
        note(f"note: {line}")
    made = make_plan(loaded, pipeline.stages, _accounting(like) if like is not None else None)
    present(made.to_json(), plan_blocks(made), as_json=as_json)
    if made.seconds is None and not as_json:
        note("the time is unknown: run a preview or a small run, then name its folder with --like")


@app.command()
def retry(
    folder: FolderArgument,
    stage: Annotated[str | None, typer.Option(help="Only the failures of this stage.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no accounting.")] = False,
) -> None:
    """Try what failed again, with new samples."""
    from nemotron4.errors import unknown
    from nemotron4.progress import Progress
    from nemotron4.synth.execute import run_recipe
    from nemotron4.synth.recipe import LEDGER, load_saved_recipe, load_saved_shard
    from nemotron4.synth.writer import Ledger

    loaded, shard = load_saved_recipe(folder), load_saved_shard(folder) or (0, 1)
    if stage is not None and stage not in (names := [each.name for each in loaded.stage]):
        raise unknown("stage", stage, names)
    ledger = Ledger(folder / LEDGER)
    try:
        number = ledger.requeue_failed(stage)
    finally:
        ledger.close()
    note(f"{number} failures are tried again")
    with nullcontext() if quiet else Progress(None, name=loaded.name) as progress:
        outcome = run_recipe(loaded, folder, models=_local_models(loaded), shard=shard, progress=progress)
    if not quiet:
        note(f"{outcome.ending}: {outcome.reason} ({outcome.calls} calls in {outcome.seconds:.1f} s)")
        _print_accounting(folder)
    if outcome.signal is not None:
        raise typer.Exit(128 + outcome.signal)


@app.command()
def export(
    folder: FolderArgument,
    partial: Annotated[bool, typer.Option("--partial", help="Export an unfinished run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the rows, their card and plots to DIR/export."""
    from nemotron4.synth.export import export as write_export
    from nemotron4.synth.recipe import load_saved_recipe

    made = write_export(folder, load_saved_recipe(folder), is_partial_allowed=partial)
    if as_json:
        print_json({"folder": str(made.folder), "rows": made.counts, "notes": list(made.notes)})
        return
    for name, rows in made.counts.items():
        print(f"{rows}\t{made.folder / name}")
    for line in made.notes:
        note(line)


@app.command()
def review(folder: FolderArgument, port: PortOption = PAGE_PORT) -> None:
    """Look at a run's rows on a local page: accept, reject, edit, prefer, rate.

    Reviews are kept in reviews.sqlite in the run's folder, also while it runs. `synth export` leaves rejected
    rows out, takes edited answers, and writes people's preferences and ratings as rows of their own.
    """
    from nemotron4.synth.review import ReviewedRun

    serve_page(ReviewedRun(folder), port)


@app.command()
def merge(
    shards: Annotated[list[Path], typer.Argument(metavar="DIR...", help="The folders of the shards.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder of the merged run.")],
) -> None:
    """Join the shards of one recipe into a run."""
    from nemotron4.synth.check import check
    from nemotron4.synth.merge import merge as merge_shards
    from nemotron4.synth.recipe import load_saved_recipe

    changed = merge_shards(shards, out, check(load_saved_recipe(shards[0]), is_run=False))
    note(f"{changed} decisions of stages that see all rows changed; `synth run` finishes what became ready")
    _print_accounting(out)


@app.command()
def rounds(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The rounds, a TOML file.")],
    out: RunFolderOption,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate, train, evaluate, and repeat with the trained model."""
    from nemotron4.cli.child_server import own_command, run_child, served
    from nemotron4.synth.rounds import load_rounds, run_rounds

    loaded = load_rounds(recipe, overrides or [])
    manifests = run_rounds(
        loaded,
        out,
        run=lambda command: run_child(own_command(command), stdout=STDERR),  # stdout is for our own result
        serve=lambda command, folder: served(command, loaded.port, folder / "server.log"),
        report=note,
    )
    if as_json:
        print_json({"rounds": manifests})
    else:
        for manifest in manifests:
            print(f"{manifest['round']}\t{manifest['steps']['train']['result']['name']}")


@app.command()
def show(
    folder: FolderArgument,
    record: Annotated[str, typer.Argument(metavar="ID", help="An id, or its beginning.")],
) -> None:
    """Print a row's ancestors as JSON, with raw replies, scores and filters."""
    from nemotron4.synth.ledger import Reader, ancestry, find_record
    from nemotron4.synth.recipe import LEDGER

    with Reader(folder / LEDGER) as ledger:
        print(json.dumps(ancestry(ledger, find_record(ledger, record)), indent=1, ensure_ascii=False))
