"""``nemotron4 redteam replay``: do the attacks that once worked still work?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import note, print_json
from nemotron4.cli.options import JsonOption
from nemotron4.cli.redteam_sessions import DatabaseArgument

if TYPE_CHECKING:
    from nemotron4.client import ChatModel


def replay(
    database: DatabaseArgument,
    target: Annotated[str, typer.Option(metavar="URL", help="Server of the model (.../generate too).")],
    judge: Annotated[
        str,
        typer.Option(
            metavar="WHO",
            help="person (assess the new sessions later), refusal (a rule of phrases), or a URL.",
        ),
    ] = "person",
    raw: Annotated[
        bool, typer.Option("--raw", help="Ask the classifier by /v1/completions with [INST].")
    ] = False,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The classifier's policy text O1 to O13.")
    ] = None,
    model_name: Annotated[str | None, typer.Option(help="The model's name at its server.")] = None,
    judge_name: Annotated[str | None, typer.Option(help="The classifier's name at its server.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Ask every attack again that worked, and say which still works.

    Each new conversation is recorded as a session of its own.
    """
    import asyncio

    from nemotron4.client import Sampling
    from nemotron4.client.remote import JUDGE_KEY_VARIABLE, connect, is_address
    from nemotron4.errors import ConfigError
    from nemotron4.redteam import replay as replays
    from nemotron4.redteam.sessions import SessionStore
    from nemotron4.report import print_report
    from nemotron4.text.content_safety import read_policy

    opened: list[ChatModel] = []
    if judge == "person":
        decider = replays.person()
    elif judge == "refusal":
        decider = replays.refusal_rule()
    elif is_address(judge):
        opened.append(connect(judge, judge_name, key_variable=JUDGE_KEY_VARIABLE))
        decider = replays.classifier(opened[0], read_policy(policy), "raw" if raw else "chat")
    else:
        raise ConfigError(f"judge is {judge!r}; expected person, refusal or a URL")
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
    with SessionStore(database, create=False) as store:
        model = connect(target, model_name)

        async def run() -> replays.ReplayResult:
            try:
                return await replays.replay(store, model, decider, sampling, note=note)
            finally:
                for each in (model, *opened):
                    await each.close()

        result = asyncio.run(run())
    if as_json:
        print_json(result.to_json())
    else:
        print_report(replays.result_blocks(result))
