"""``nemotron4 eval``: run, score, compare and report benchmarks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Measure a model by the card's benchmarks, or score stored answers.",
)
data_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="The benchmarks' input files.")
app.add_typer(data_app, name="data")

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
        typer.echo(f"{task.name:<16}{task.title}" + (f"; card: {card}" if card else ""))


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
