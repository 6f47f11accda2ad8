"""``nemotron4 eval``: run, score, compare and report benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.eval_human import app as human_app

if TYPE_CHECKING:
    from nemotron4.client import ChatModel

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Measure a model by the card's benchmarks, or score stored answers.",
)
data_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="The benchmarks' input files.")
app.add_typer(data_app, name="data")
app.add_typer(human_app, name="human")

DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="Folder of benchmark files; default $NEMOTRON4_EVAL_DATA, then the cache."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Unsafe = Annotated[
    bool, typer.Option("--unsafe-no-sandbox", help="Run model-written code here without isolation.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn when scoring.")]


@app.command("list")
def list_tasks(as_json: AsJson = False) -> None:
    """List the benchmarks, their published values and their input files."""
    from nemotron4.evaluation.registry import TASKS

    if as_json:
        rows = [
            {
                "task": task.name,
                "title": task.title,
                "card": dict(task.card),
                "judge": task.card_judge,
                "files": [file.path for file in task.files],
                "max_new_tokens": task.sampling.max_tokens,
                "temperature": task.sampling.temperature,
            }
            for task in TASKS.values()
        ]
        typer.echo(json.dumps({"tasks": rows}))
        return
    for task in TASKS.values():
        card = ", ".join(f"{name} {value:g}" for name, value in task.card.items())
        typer.echo(f"{task.name:<20}{task.title}" + (f"; card: {card}" if card else ""))


@data_app.command("check")
def check_data(
    tasks: Annotated[list[str] | None, typer.Argument(help="Benchmarks; default all.")] = None,
    folder: DataFolder = None,
    as_json: AsJson = False,
) -> None:
    """Say for every input file whether it is there, and whether it is the expected version."""
    from nemotron4.evaluation.data import data_folder
    from nemotron4.evaluation.datafiles import check_files, files_of

    rows = check_files(files_of(tasks or []), data_folder(folder))
    if as_json:
        typer.echo(json.dumps({"folder": str(data_folder(folder)), "files": rows}))
    else:
        for row in rows:
            typer.echo(f"{row['status']:<9}{row['path']}  ({row['licence']}; {row['source']})")
    if any(row["status"] == "changed" for row in rows):
        raise typer.Exit(1)


@data_app.command("fetch")
def fetch_data(
    tasks: Annotated[list[str] | None, typer.Argument(help="Benchmarks; default all.")] = None,
    folder: DataFolder = None,
) -> None:
    """Download the input files that have an address, and check them. Never replaces a good file."""
    from nemotron4.evaluation.data import data_folder
    from nemotron4.evaluation.datafiles import fetch_files, files_of

    for line in fetch_files(files_of(tasks or []), data_folder(folder)):
        typer.echo(line, err=True)


@app.command()
def score(
    task: Annotated[str, typer.Argument(help="Benchmark; see `nemotron4 eval list`.")],
    responses: Annotated[
        Path | None, typer.Option(help='Answers: JSON lines {"id", "response"}, also .gz.')
    ] = None,
    judgments: Annotated[
        Path | None,
        typer.Option(help='Judgments: {"id", "turn" or "game", "text"}, or log-probabilities.'),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Replaces the benchmark's data file.")] = None,
    folder: DataFolder = None,
    seed: Seed = 0,
    model: Annotated[str | None, typer.Option(help="Name of the model, for the result.")] = None,
    judge: Annotated[str | None, typer.Option(help="Name of the judge, for the result.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json and items.jsonl.")] = None,
    unsafe: Unsafe = False,
    as_json: AsJson = False,
) -> None:
    """Score stored answers again, without any model; the number is that of a live run."""
    from nemotron4.evaluation.data import DataSource, data_folder
    from nemotron4.evaluation.registry import find_task
    from nemotron4.evaluation.result import save
    from nemotron4.evaluation.scoring import score_files
    from nemotron4.evaluation.tables import result_lines

    result = score_files(
        find_task(task),
        DataSource(data_folder(folder), data),
        responses=responses,
        judgments=judgments,
        seed=seed,
        allow_unsafe=unsafe,
        model=model,
        judge=judge,
    )
    if out is not None:
        save(result, out)
    typer.echo(json.dumps(result.to_json()) if as_json else "\n".join(result_lines(result)))


@app.command()
def run(
    tasks: Annotated[list[str], typer.Argument(help="Benchmarks; see `nemotron4 eval list`.")],
    model: Annotated[str, typer.Option(help="URL of a server, or a model to load in this process.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the same command resumes it.")],
    judge: Annotated[str | None, typer.Option(help="URL of the judge's server.")] = None,
    model_name: Annotated[str | None, typer.Option(help="The model's name at its server.")] = None,
    judge_name: Annotated[str | None, typer.Option(help="The judge's name at its server.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="A seeded sample of this size; raising it goes on.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Replaces the benchmark's data file.")] = None,
    folder: DataFolder = None,
    seed: Seed = 0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 16,
    unsafe: Unsafe = False,
    as_json: AsJson = False,
) -> None:
    """Ask a model, have the judge judge, score. Stopped at any point, the same command goes on."""
    from nemotron4.cli.console import note, print_json
    from nemotron4.client.remote import JUDGE_KEY_VARIABLE, connect
    from nemotron4.errors import ConfigError
    from nemotron4.evaluation import inspect_adapter
    from nemotron4.evaluation.data import DataSource, data_folder
    from nemotron4.evaluation.registry import find_task
    from nemotron4.evaluation.runner import RunSettings, run_task
    from nemotron4.evaluation.tables import result_lines
    from nemotron4.runs import run_stoppable

    inspect_adapter.check_installed()
    chosen = [find_task(name) for name in tasks]
    if judge is None and (judged := [task.name for task in chosen if task.judge is not None]):
        raise ConfigError(f"{judged[0]} is scored by a judge", hint="pass --judge URL")
    if data is not None and len(chosen) > 1:
        raise ConfigError(f"--data replaces the file of one benchmark; {len(chosen)} are given")
    source = DataSource(data_folder(folder), data)
    settings = RunSettings(out=out, limit=limit, seed=seed, concurrency=concurrency, allow_unsafe=unsafe)
    chat = _open_model(model, model_name)
    judging = None if judge is None else connect(judge, judge_name, key_variable=JUDGE_KEY_VARIABLE)

    async def run_all() -> None:
        for task in chosen:
            result = await run_task(task, source, settings, model=chat, judge=judging, note=note)
            if as_json:
                print_json(result.to_json())
            else:
                typer.echo("\n".join(result_lines(result)))
        await chat.close()
        if judging is not None:
            await judging.close()

    run_stoppable(run_all())


def _open_model(model: str, name: str | None) -> ChatModel:
    """The server at an address, or an engine in this process."""
    from nemotron4.client import EngineChatModel
    from nemotron4.client.remote import connect, is_address
    from nemotron4.inference.load import load

    return connect(model, name) if is_address(model) else EngineChatModel(load(model), name=name)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder with result.json and items.jsonl.")],
    second: Annotated[Path, typer.Argument(help="The other folder, of the same benchmark.")],
    as_json: AsJson = False,
) -> None:
    """Test two results on the same items against chance; refuses results of different definitions."""
    from nemotron4.evaluation.compare import compare as compare_results
    from nemotron4.evaluation.compare import comparison_lines
    from nemotron4.evaluation.result import load_result

    comparison = compare_results(load_result(first), load_result(second))
    typer.echo(json.dumps(comparison.to_json()) if as_json else "\n".join(comparison_lines(comparison)))
    if comparison.differences:
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or of single results.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.html and the plots.")],
) -> None:
    """Write the card's tables with these results beside them, with plots and provenance."""
    from nemotron4.evaluation.report import write_report

    for path in write_report(folders, out):
        typer.echo(str(path))
