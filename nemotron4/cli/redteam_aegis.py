"""``nemotron4 redteam aegis``: how many answers a content-safety classifier finds unsafe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nemotron4.cli.console import note, print_json
from nemotron4.cli.options import JsonOption


def aegis(
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help='JSON lines: {"prompt" or "messages", "id"?, "category"?}.')
    ],
    target: Annotated[str, typer.Option(metavar="URL", help="Server of the model (.../generate too).")],
    classifier: Annotated[
        str, typer.Option(metavar="URL", help="OpenAI-compatible server of the classifier.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run; the same command resumes it.")],
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Get the AEGIS test prompts from their hub if FILE is not there.")
    ] = False,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Policy text O1 to O13 instead of our wording.")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Ask by /v1/completions with [INST], as AEGIS' own classifiers need it."),
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 8,
    model_name: Annotated[str | None, typer.Option(help="The model's name at its server.")] = None,
    classifier_name: Annotated[str | None, typer.Option(help="The classifier's name at its server.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask every prompt, have every answer judged by the 13-category policy, report rate and shares.

    Keys: NEMOTRON4_API_KEY for the model, NEMOTRON4_JUDGE_API_KEY for the classifier.
    """
    import hashlib

    from nemotron4.client.remote import JUDGE_KEY_VARIABLE, connect
    from nemotron4.redteam.aegis import AegisResult, AegisSettings, run_aegis
    from nemotron4.redteam.aegis_prompts import fetch_prompts, read_aegis_prompts
    from nemotron4.redteam.aegis_report import summary_blocks, write_report
    from nemotron4.report import print_report
    from nemotron4.runs import held, run_stoppable
    from nemotron4.text.content_safety import read_policy

    if fetch:
        note(f"{prompts}: {fetch_prompts(prompts)} prompts")
    rows, num_strange = read_aegis_prompts(prompts)
    if num_strange:
        note(
            f"{prompts}: {num_strange} rows have a category that is none of the 13; they count as without one"
        )
    text = read_policy(policy)
    model = connect(target, model_name)
    judge = connect(classifier, classifier_name, key_variable=JUDGE_KEY_VARIABLE)
    settings = AegisSettings(
        out=out,
        max_tokens=max_tokens,
        temperature=temperature,
        concurrency=concurrency,
        form="raw" if raw else "chat",
    )

    async def run() -> AegisResult:
        try:
            return await run_aegis(
                rows,
                settings,
                model=model,
                classifier=judge,
                policy=text,
                prompts_sha256=hashlib.sha256(prompts.read_bytes()).hexdigest(),
                note=note,
            )
        finally:
            await model.close()
            await judge.close()

    with held(out):
        result = run_stoppable(run())
    written = write_report(result, out)
    if as_json:
        print_json(result.to_json())
    else:
        print_report(summary_blocks(result))
    note(f"wrote {', '.join(map(str, written))}")
