"""``nemotron4 eval``: run, score, compare and report benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nemotron4.cli.console import group, note, present, print_json
from nemotron4.cli.eval_human import app as human_app
from nemotron4.cli.options import (
    ConcurrencyOption,
    JsonOption,
    NameAtServerOption,
    RunFolderOption,
    SeedOption,
)
from nemotron4.report import Table, print_report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nemotron4.client import ChatModel
    from nemotron4.evaluation.data import DataSource
    from nemotron4.evaluation.runner import RunSettings
    from nemotron4.evaluation.task import Task

app = group("Measure a model by the card's benchmarks, or score stored answers.")
data_app = group("The benchmarks' input files.")
app.add_typer(data_app, name="data")
app.add_typer(human_app, name="human")

DataFolder = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Benchmark files; default $NEMOTRON4_EVAL_DATA, then the cache."),
]
TASK_HELP = "A name of `eval list`, a folder with task.toml, or FILE.py:FUNCTION."
TaskArgument = Annotated[str, typer.Argument(help=TASK_HELP)]
TaskArguments = Annotated[list[str], typer.Argument(metavar="TASK", help=TASK_HELP)]
Unsafe = Annotated[
    bool, typer.Option("--unsafe-no-sandbox", help="Run model-written code without isolation.")
]
Data = Annotated[Path | None, typer.Option(help="Another data file.")]
Model = Annotated[str, typer.Option(help="URL of a server, or a model to load here.")]
JudgeUrl = Annotated[str | None, typer.Option(help="URL of the judge's server.")]
Limit = Annotated[int | None, typer.Option(min=1, help="A sample of this size; raising it goes on.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Instead of the benchmark's.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="Instead of the benchmark's.")]
System = Annotated[str | None, typer.Option(help="The system message.")]
NumFewshot = Annotated[int | None, typer.Option(min=0, help="Worked examples, where allowed.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting that `eval list` shows; repeatable."),
]
Epochs = Annotated[int, typer.Option(min=1, help="Answers to each item, for means and pass@k.")]
OnFailureOption = Annotated[
    Literal["wrong", "exclude", "stop"] | None,
    typer.Option(help="What a hopeless request counts as; default the benchmark's rule."),
]


@app.command("list")
def list_tasks(folder: DataFolder = None, as_json: JsonOption = False) -> None:
    """List benchmarks and own tasks, with published values and settings."""
    from nemotron4.evaluation.data import data_folder
    from nemotron4.evaluation.options import settable
    from nemotron4.evaluation.registry import all_tasks

    tasks = all_tasks(data_folder(folder))
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
                "on_failure": task.on_failure,
                "settings": settable(task),
            }
            for task in tasks
        ]
        print_json({"tasks": rows})
        return
    lines = [
        (
            task.name,
            task.title,
            ", ".join(f"{name} {value:g}" for name, value in task.card.items()),
            ", ".join(settable(task)),
        )
        for task in tasks
    ]
    print_report([Table(("task", "title", "card", "--set"), lines)])


@data_app.command("check")
def check_data(
    tasks: Annotated[list[str] | None, typer.Argument(help="Benchmarks; default all.")] = None,
    folder: DataFolder = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether each input file is there and the expected version."""
    from nemotron4.evaluation.data import data_folder
    from nemotron4.evaluation.registry import check_files, files_of

    rows = check_files(files_of(tasks or []), data_folder(folder))
    if as_json:
        print_json({"folder": str(data_folder(folder)), "files": rows})
    else:
        columns = ("status", "path", "licence", "source")
        print_report([Table(columns, [[row[name] for name in columns] for row in rows])])
    if any(row["status"] == "changed" for row in rows):
        raise typer.Exit(1)


@data_app.command("fetch")
def fetch_data(
    tasks: Annotated[list[str] | None, typer.Argument(help="Benchmarks; default all.")] = None,
    folder: DataFolder = None,
) -> None:
    """Download and check the input files that have an address."""
    from nemotron4.evaluation.data import data_folder
    from nemotron4.evaluation.registry import fetch_files, files_of

    for line in fetch_files(files_of(tasks or []), data_folder(folder)):
        note(line)


@app.command()
def score(
    task: TaskArgument,
    responses: Annotated[
        Path | None, typer.Option(help='Answers: JSON lines {"id", "response"}, also .gz.')
    ] = None,
    judgments: Annotated[
        Path | None, typer.Option(help='Judgments: {"id", "turn" or "game", "text"}, or log-probabilities.')
    ] = None,
    failures: Annotated[
        Path | None,
        typer.Option(help="Requests that failed; default failures.jsonl next to the answers."),
    ] = None,
    on_failure: OnFailureOption = None,
    limit: Limit = None,
    data: Data = None,
    folder: DataFolder = None,
    seed: SeedOption = 0,
    model: Annotated[str | None, typer.Option(help="Its name, for the result.")] = None,
    judge: Annotated[str | None, typer.Option(help="Its name, for the result.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json and items.jsonl.")] = None,
    unsafe: Unsafe = False,
    as_json: JsonOption = False,
) -> None:
    """Score stored answers; the number is that of a live run."""
    from nemotron4.evaluation.data import DataSource, data_folder
    from nemotron4.evaluation.registry import find_task
    from nemotron4.evaluation.result import result_blocks, save
    from nemotron4.evaluation.scoring import require_scored, score_files

    found = find_task(task, data_folder(folder))
    result = score_files(
        found,
        DataSource(data_folder(folder), data),
        responses=responses,
        judgments=judgments,
        failures=failures,
        on_failure=on_failure,
        limit=limit,
        seed=seed,
        allow_unsafe=unsafe,
        model=model,
        judge=judge,
    )
    if out is not None:
        save(result, out)
    present(result.to_json(), result_blocks(result, found), as_json=as_json)
    require_scored(result)


@app.command()
def run(
    tasks: TaskArguments,
    model: Model,
    out: RunFolderOption,
    judge: JudgeUrl = None,
    model_name: NameAtServerOption = None,
    judge_name: NameAtServerOption = None,
    limit: Limit = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    system: System = None,
    num_fewshot: NumFewshot = None,
    set_: Settings = None,
    epochs: Epochs = 1,
    on_failure: OnFailureOption = None,
    data: Data = None,
    folder: DataFolder = None,
    seed: SeedOption = 0,
    concurrency: ConcurrencyOption = 16,
    unsafe: Unsafe = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a model, have a judge judge, score. Stopped, the same command goes on."""
    from nemotron4.evaluation.data import DataSource, data_folder
    from nemotron4.evaluation.options import Changes, with_changes
    from nemotron4.evaluation.registry import find_task
    from nemotron4.evaluation.runner import RunSettings
    from nemotron4.runs import run_stoppable

    changes = Changes(max_tokens, temperature, system, num_fewshot, tuple(set_ or ()))
    chosen = [with_changes(find_task(name, data_folder(folder)), changes) for name in tasks]
    _check(chosen, judge, data)
    settings = RunSettings(
        out=out,
        limit=limit,
        seed=seed,
        epochs=epochs,
        concurrency=concurrency,
        allow_unsafe=unsafe,
        on_failure=on_failure,
    )
    source = DataSource(data_folder(folder), data)
    chat, judging = _open_model(model, model_name), _open_judge(judge, judge_name)
    run_stoppable(_run_all(chosen, source, settings, chat, judging, as_json=as_json))


def _check(tasks: Sequence[Task], judge: str | None, data: Path | None) -> None:
    from nemotron4.errors import ConfigError

    if judge is None and (judged := [task.name for task in tasks if task.judge is not None]):
        raise ConfigError(f"{judged[0]} is scored by a judge", hint="pass --judge URL")
    if data is not None and len(tasks) > 1:
        raise ConfigError(f"--data replaces the file of one benchmark; {len(tasks)} are given")


async def _run_all(
    tasks: Sequence[Task],
    source: DataSource,
    settings: RunSettings,
    chat: ChatModel,
    judge: ChatModel | None,
    *,
    as_json: bool,
) -> None:
    """One after the other; a result in which nothing was scored is an error once all have run."""
    from nemotron4.evaluation.result import result_blocks
    from nemotron4.evaluation.runner import run_task
    from nemotron4.evaluation.scoring import require_scored
    from nemotron4.report import print_report

    results = []
    try:
        for task in tasks:
            results.append(await run_task(task, source, settings, model=chat, judge=judge))
            if not as_json:
                print_report(result_blocks(results[-1], task))
    finally:
        await chat.close()
        if judge is not None:
            await judge.close()
    if as_json:
        found = [result.to_json() for result in results]
        print_json(found[0] if len(found) == 1 else {"results": found})
    for result in results:
        require_scored(result)


def _open_model(model: str, name: str | None) -> ChatModel:
    """The server at an address, or an engine in this process."""
    from nemotron4.client.remote import connect, is_address

    if is_address(model):
        return connect(model, name)
    from nemotron4.client import EngineChatModel
    from nemotron4.inference.load import load  # torch: two seconds that a run against a server does not need

    return EngineChatModel(load(model), name=name)


def _open_judge(judge: str | None, name: str | None) -> ChatModel | None:
    from nemotron4.client.remote import JUDGE_KEY_VARIABLE, connect

    return None if judge is None else connect(judge, name, key_variable=JUDGE_KEY_VARIABLE)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a result.")],
    second: Annotated[Path, typer.Argument(help="Folder of another result.")],
    as_json: JsonOption = False,
) -> None:
    """Test two results of one definition on their common items."""
    from nemotron4.evaluation.compare import compare as compare_results
    from nemotron4.evaluation.compare import comparison_blocks
    from nemotron4.evaluation.result import load_result

    comparison = compare_results(load_result(first), load_result(second))
    present(comparison.to_json(), comparison_blocks(comparison), as_json=as_json)
    if comparison.differences:
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or results.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.html and the plots.")],
) -> None:
    """Write the card's tables with these results, plots and provenance."""
    from nemotron4.evaluation.report import write_report

    for path in write_report(folders, out):
        print(path)
