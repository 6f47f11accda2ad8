"""``nemotron4 eval human``: people compare models blind, by the technical report's protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.asking import ReadLine, ask_number, ask_word, read_line
from nemotron4.cli.console import group, note, print_json
from nemotron4.cli.options import JsonOption
from nemotron4.errors import ConfigError, Nemotron4Error

if TYPE_CHECKING:
    from nemotron4.evaluation.human.study import RatingLog, Study, StudyPrompt

app = group("Have people compare models: blind, in random order, on the report's 6-point scale.")

StudyArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a study.")]
RULE = "-" * 72


@app.command()
def new(
    out: Annotated[Path, typer.Option(metavar="DIR", help="The study; the same command resumes it.")],
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help='JSON lines: {"prompt" or "messages", "id"?, "category"?}.')
    ],
    models: Annotated[
        str,
        typer.Option(
            metavar="NAME=FROM,...", help='FROM: a file of {"id", "response"} rows, or the URL of a server.'
        ),
    ],
    seed: Annotated[int, typer.Option(help="Of every random order.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer of a server, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="Of a server; 0 is greedy.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 8,
) -> None:
    """Make a study: collect every model's answer to every prompt."""
    from nemotron4.client import Sampling
    from nemotron4.evaluation.human.answers import collect_answers
    from nemotron4.evaluation.human.study import Study, create, read_prompts
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
    create(out, rows, sources, seed=seed)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    run_stoppable(collect_answers(out, rows, sources, sampling, concurrency=concurrency, note=note))
    study = Study(out)
    left_out = len(study.prompts) - len(study.complete_prompts)
    if left_out:
        note(f"{left_out} of {len(study.prompts)} prompts lack an answer of some model and are not shown")
    note(f"start with: nemotron4 eval human rate {out} --annotator YOU")


@app.command()
def rate(
    study: StudyArgument,
    annotator: Annotated[str, typer.Option(metavar="HANDLE", help="Who you are: any short name.")],
    again: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Rate this prompt again; repeatable.")
    ] = None,
) -> None:
    """Rate answers in the terminal: names hidden, in random order. Leave with Ctrl-D; go on any time."""
    from nemotron4.evaluation.human.study import RatingLog, Study

    opened = Study(study)
    log = RatingLog(opened, annotator)
    repeated = set(again or ())
    unknown = repeated - {prompt.id for prompt in opened.prompts}
    if unknown:
        raise ConfigError(f"the study has no prompt {sorted(unknown)[0]!r}")
    try:
        order = opened.prompt_order(annotator)
        for number, prompt in enumerate(order, start=1):
            left = [
                model
                for model in opened.answer_order(annotator, prompt.id)
                if prompt.id in repeated or (prompt.id, model) not in log.rated
            ]
            if left and (not repeated or prompt.id in repeated):
                print(f"\n{RULE}\nprompt {number} of {len(order)}\n{RULE}")
                _rate_prompt(opened, prompt, annotator, left, log)
        note("every prompt is rated; thank you")
    finally:
        log.close()


def _rate_prompt(
    study: Study,
    prompt: StudyPrompt,
    annotator: str,
    left: list[str],
    log: RatingLog,
    read: ReadLine = read_line,
) -> None:
    from nemotron4.evaluation.human.study import AXES, LENGTHS, SCALE, SCALE_WORDS, AnswerRating

    for message in prompt.messages:
        print(f"[{message.role}]\n{message.content}\n")
    order = study.answer_order(annotator, prompt.id)
    letters = {model: chr(ord("A") + place) for place, model in enumerate(order)}
    for model in order:
        print(f"{RULE}\nanswer {letters[model]}\n\n{study.answers[model][prompt.id]}\n")
    note("; ".join(f"{level} {words}" for level, words in SCALE_WORDS.items()))
    for model in left:
        values = {axis: ask_number(f"answer {letters[model]}, {axis}", SCALE, read=read) for axis in AXES}
        length = ask_word(f"answer {letters[model]}, length", LENGTHS, read=read)
        assert all(value is not None for value in values.values())
        log.add(
            AnswerRating(
                annotator=annotator,
                prompt=prompt.id,
                model=model,
                position=order.index(model),
                helpfulness=values["helpfulness"] or 0,
                truthfulness=values["truthfulness"] or 0,
                length=length,
            )
        )


@app.command()
def report(
    study: StudyArgument,
    baseline: Annotated[str, typer.Option(metavar="NAME", help="The model that the others are compared to.")],
    as_json: JsonOption = False,
) -> None:
    """Win, tie and loss against a baseline, overall and by category, with intervals and agreement."""
    from nemotron4.evaluation.human.results import evaluate, result_blocks
    from nemotron4.evaluation.human.study import Study
    from nemotron4.report import print_report

    result = evaluate(Study(study), baseline)
    if not result.num_ratings:
        raise Nemotron4Error(f"{study}: nobody has rated yet", hint=f"nemotron4 eval human rate {study}")
    if as_json:
        print_json(result.to_json())
    else:
        print_report(result_blocks(result))
