"""``nemotron4 eval human``: people compare models blind, by the technical report's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import (
    PAGE_PORT,
    PortOption,
    ReadLine,
    ask_number,
    ask_word,
    group,
    note,
    present,
    read_line,
    serve_page,
    write_export,
)
from nemotron4.cli.options import (
    ConcurrencyOption,
    FolderArgument,
    JsonOption,
    MaxTokensOption,
    RunFolderOption,
    SeedOption,
    TemperatureOption,
)
from nemotron4.errors import ConfigError, Nemotron4Error
from nemotron4.evaluation.settings import StudySettings

if TYPE_CHECKING:
    from nemotron4.evaluation.human import Study
    from nemotron4.records import AskedPrompt

app = group("Have people compare models: blind, in random order, on the report's 6-point scale.")

RULE = "-" * 72


@app.command()
def new(
    out: RunFolderOption,
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help='JSON lines: {"prompt" or "messages", "id"?, "category"?}.')
    ],
    models: Annotated[
        str,
        typer.Option(
            metavar="NAME=FROM,...", help='FROM: a file of {"id", "response"} rows, or the URL of a server.'
        ),
    ],
    seed: SeedOption = StudySettings.seed,
    max_tokens: MaxTokensOption = StudySettings.max_tokens,
    temperature: TemperatureOption = StudySettings.temperature,
    concurrency: ConcurrencyOption = StudySettings.concurrency,
) -> None:
    """Make a study: collect every model's answer to every prompt."""
    from nemotron4.client import Sampling
    from nemotron4.evaluation.human import Study, collect_answers, create
    from nemotron4.records import read_prompts
    from nemotron4.runs import run_stoppable

    sources: dict[str, str] = {}
    for part in models.split(","):
        name, separator, source = part.strip().partition("=")
        if not separator or not source:
            raise ConfigError(f"models has {part!r}; expected NAME=FILE or NAME=URL")
        if name in sources:
            raise ConfigError(f"models names {name!r} twice")
        sources[name] = source
    rows = read_prompts(prompts)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    create(out, rows, sources, seed=seed, sampling=sampling)
    run_stoppable(collect_answers(out, rows, sources, sampling, concurrency=concurrency, note=note))
    study = Study(out)
    left_out = len(study.prompts) - len(study.complete_prompts)
    if left_out:
        note(f"{left_out} of {len(study.prompts)} prompts lack an answer of some model and are not shown")
    note(f"start with: nemotron4 eval human rate {out} --annotator YOU")


@app.command()
def rate(
    study: FolderArgument,
    annotator: Annotated[str, typer.Option(metavar="HANDLE", help="Who you are: any short name.")],
    again: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Rate this prompt again; repeatable.")
    ] = None,
) -> None:
    """Rate answers in the terminal. Leave with Ctrl-D; go on any time."""
    from nemotron4.evaluation.human import Study, check_name

    check_name("annotator", annotator)
    opened = Study(study)
    repeated = set(again or ())
    unknown = repeated - {prompt.id for prompt in opened.prompts}
    if unknown:
        raise ConfigError(f"the study has no prompt {sorted(unknown)[0]!r}")
    rated = {(each.prompt, each.model) for each in opened.ratings() if each.annotator == annotator}
    order = opened.prompt_order(annotator)
    for number, prompt in enumerate(order, start=1):
        left = [
            model
            for model in opened.answer_order(annotator, prompt.id)
            if prompt.id in repeated or (prompt.id, model) not in rated
        ]
        if left and (not repeated or prompt.id in repeated):
            print(f"\n{RULE}\nprompt {number} of {len(order)}\n{RULE}")
            _rate_prompt(opened, prompt, annotator, left)
    note("every prompt is rated; thank you")


def _rate_prompt(
    study: Study, prompt: AskedPrompt, annotator: str, left: list[str], read: ReadLine = read_line
) -> None:
    from nemotron4.evaluation.human import AXES, LENGTHS, SCALE

    for message in prompt.messages:
        print(f"[{message.role}]\n{message.content}\n")
    letters = {model: letter for letter, model in study.answer_keys(prompt.id, annotator).items()}
    for model, letter in letters.items():
        print(f"{RULE}\nanswer {letter}\n\n{study.answers[model][prompt.id]}\n")
    note("; ".join(f"{level} {words}" for level, words in SCALE.items()))
    levels = [int(level) for level in SCALE]
    for model in left:
        name = f"answer {letters[model]}"
        values: dict[str, object] = {axis: ask_number(f"{name}, {axis}", levels, read=read) for axis in AXES}
        values["length"] = ask_word(f"{name}, length", LENGTHS, read=read)
        study.rate(annotator, prompt.id, model, values)


@app.command()
def page(study: FolderArgument, port: PortOption = PAGE_PORT) -> None:
    """Rate answers on a local page, several people at once."""
    from nemotron4.evaluation.human import Study

    serve_page(Study(study), port)


@app.command()
def export(
    study: FolderArgument,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines; .gz and .zst compress.")],
    form: Annotated[str, typer.Option(help="judgments or preference.")] = "judgments",
    as_json: JsonOption = False,
) -> None:
    """Write what people said, or preference pairs for training. The rows name the models."""
    from nemotron4.evaluation.human import Study

    write_export(Study(study).export(form), form, out, as_json=as_json)


@app.command()
def report(
    study: FolderArgument,
    baseline: Annotated[str, typer.Option(metavar="NAME", help="The model to compare with.")],
    as_json: JsonOption = False,
) -> None:
    """Win, tie and loss against a baseline, with intervals and agreement."""
    from nemotron4.evaluation.human import Study
    from nemotron4.evaluation.human_results import evaluate, result_blocks

    result = evaluate(Study(study), baseline)
    if not result.num_ratings:
        raise Nemotron4Error(f"{study}: nobody has rated yet", hint=f"nemotron4 eval human rate {study}")
    present(result.to_json(), result_blocks(result), as_json=as_json)
