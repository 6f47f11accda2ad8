"""``nemotron4 redteam``: attack a model and keep what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import group, note, present, run_closing
from nemotron4.cli.options import (
    ConcurrencyOption,
    JsonOption,
    MaxTokensOption,
    NameAtServerOption,
    PolicyOption,
    RawOption,
    RunFolderOption,
    TargetOption,
    TemperatureOption,
)
from nemotron4.cli.redteam_garak import compare, garak
from nemotron4.cli.redteam_sessions import DatabaseArgument
from nemotron4.cli.redteam_sessions import app as sessions_app
from nemotron4.errors import unknown
from nemotron4.redteam.settings import AegisSettings, AttackSettings, ReplaySettings

if TYPE_CHECKING:
    from nemotron4.client import ChatModel
    from nemotron4.redteam.judges import AttackJudge

ATTACKER_KEY_VARIABLE = "NEMOTRON4_ATTACKER_API_KEY"

app = group("Attack a model and keep what came of it.")
app.command("garak")(garak)
app.command("compare")(compare)
app.add_typer(sessions_app, name="sessions")

MaxFailuresOption = Annotated[
    int | None, typer.Option(min=0, help="No report if more prompts than this got no answer.")
]


@app.command()
def aegis(
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help='JSON lines: {"prompt" or "messages", "id"?, "category"?}.')
    ],
    target: TargetOption,
    classifier: Annotated[
        str, typer.Option(metavar="URL", help="The classifier's OpenAI-compatible server.")
    ],
    out: RunFolderOption,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Get the AEGIS test prompts if FILE is missing.")
    ] = False,
    policy: PolicyOption = None,
    raw: RawOption = False,
    max_tokens: MaxTokensOption = AegisSettings.max_tokens,
    temperature: TemperatureOption = AegisSettings.temperature,
    concurrency: ConcurrencyOption = AegisSettings.concurrency,
    model_name: NameAtServerOption = None,
    classifier_name: NameAtServerOption = None,
    max_failures: MaxFailuresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask prompts, have the answers judged by the 13-category policy.

    Keys: NEMOTRON4_API_KEY for the model, NEMOTRON4_JUDGE_API_KEY for the classifier.
    """
    from nemotron4.client.remote import JUDGE_KEY_VARIABLE, connect
    from nemotron4.recipe import hash_of
    from nemotron4.redteam.aegis import fetch_prompts, read_aegis_prompts, run_aegis
    from nemotron4.redteam.aegis_report import summary_blocks, write_report
    from nemotron4.runs import held
    from nemotron4.text.content_safety import read_policy

    if fetch:
        note(f"{prompts}: {fetch_prompts(prompts)} prompts")
    rows, num_strange = read_aegis_prompts(prompts)
    if num_strange:
        strange = f"{num_strange} rows have a category that is none of the 13"
        note(f"{prompts}: {strange}; they count as without one")
    text = read_policy(policy)
    model = connect(target, model_name)
    judge = connect(classifier, classifier_name, key_variable=JUDGE_KEY_VARIABLE)
    settings = AegisSettings(
        max_tokens=max_tokens,
        temperature=temperature,
        concurrency=concurrency,
        form="raw" if raw else "chat",
        max_failures=max_failures,
    )
    sha256 = hash_of(prompts)
    with held(out):
        work = run_aegis(
            rows, settings, out=out, model=model, classifier=judge, policy=text, prompts_sha256=sha256
        )
        result = run_closing(work, model, judge)
    written = write_report(result, out)
    present(result.to_json(), summary_blocks(result), as_json=as_json)
    note(f"wrote {', '.join(map(str, written))}")


@app.command()
def attack(
    target: TargetOption,
    attacker: Annotated[str, typer.Option(metavar="URL", help="Server of the model that attacks.")],
    judge: Annotated[str, typer.Option(metavar="URL", help="Server of the model that scores.")],
    out: RunFolderOption,
    method: Annotated[str, typer.Option(help="pair, tap or crescendo.")] = AttackSettings.method,
    goals: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='JSON lines: {"goal", "id"?, "area"?, "category"?}. Default: ours.'
        ),
    ] = None,
    sessions: Annotated[
        Path | None, typer.Option(metavar="DB", help="Record the best attempts here.")
    ] = None,
    streams: Annotated[
        int, typer.Option(min=1, help="Prompts refined at once (pair); branches (tap).")
    ] = AttackSettings.streams,
    depth: Annotated[int, typer.Option(min=1, help="Refinements of each.")] = AttackSettings.depth,
    width: Annotated[int, typer.Option(min=1, help="Leaves that tap keeps.")] = AttackSettings.width,
    max_queries: Annotated[
        int, typer.Option(min=1, help="Most prompts to the target for a goal.")
    ] = AttackSettings.max_queries,
    success_score: Annotated[
        int, typer.Option(min=2, max=10, help="Score, 1 to 10, that reaches a goal.")
    ] = AttackSettings.success_score,
    concurrency: ConcurrencyOption = AttackSettings.concurrency,
    max_failures: MaxFailuresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let an attacker model play PAIR, TAP or Crescendo against a target, with a judge model.

    Keys: NEMOTRON4_API_KEY for the target, NEMOTRON4_ATTACKER_API_KEY, NEMOTRON4_JUDGE_API_KEY.
    """
    from nemotron4.client.remote import JUDGE_KEY_VARIABLE, KEY_VARIABLE, connect
    from nemotron4.redteam import attacks
    from nemotron4.redteam.attack_report import summary_blocks, write_report
    from nemotron4.redteam.sessions import SessionStore
    from nemotron4.runs import held

    if method not in attacks.METHODS:
        raise unknown("method", method, attacks.METHODS)
    settings = AttackSettings(
        method=method,  # type: ignore[arg-type]
        streams=streams,
        depth=depth,
        width=width,
        max_queries=max_queries,
        success_score=success_score,
        concurrency=concurrency,
        max_failures=max_failures,
    )
    asked = attacks.report_goals() if goals is None else attacks.read_goals(goals)
    keys = (KEY_VARIABLE, ATTACKER_KEY_VARIABLE, JUDGE_KEY_VARIABLE)
    urls = (target, attacker, judge)
    models = [connect(url, None, key_variable=key) for url, key in zip(urls, keys, strict=True)]
    attacked, attacking, judging = models
    names = {"model": attacked.name, "attacker": attacking.name, "judge": judging.name}
    with held(out):
        work = attacks.attack_goals(
            asked, settings, out=out, target=attacked, attacker=attacking, judge=judging
        )
        results = run_closing(work, *models)
        written = write_report(results, settings, out, **names)
    if sessions is not None:
        with SessionStore(sessions) as store:
            number = attacks.record_sessions(
                store, results, settings, model=names["model"], judge=names["judge"]
            )
        note(f"{number} sessions recorded in {sessions}")
    values = {**names, "method": method, "goals": [each.to_json() for each in results]}
    present(values, summary_blocks(results, settings, names["model"]), as_json=as_json)
    note(f"wrote {', '.join(map(str, written))}")


@app.command()
def replay(
    database: DatabaseArgument,
    target: TargetOption,
    judge: Annotated[
        str,
        typer.Option(
            metavar="WHO", help="refusal (a rule of phrases), person (later), or a classifier's URL."
        ),
    ] = "refusal",
    raw: RawOption = False,
    policy: PolicyOption = None,
    model_name: NameAtServerOption = None,
    judge_name: NameAtServerOption = None,
    max_tokens: MaxTokensOption = ReplaySettings.max_tokens,
    temperature: TemperatureOption = ReplaySettings.temperature,
    concurrency: ConcurrencyOption = ReplaySettings.concurrency,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the replays. Default: DB.replays.")
    ] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JUnit XML.")] = None,
    max_failures: MaxFailuresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask every attack again that worked. The exit status is 1 if one still works or none could be judged.

    Each new conversation is recorded as a session of its own. A killed replay continues; a finished one is
    what the next one is compared with.
    """
    from nemotron4.client.remote import connect
    from nemotron4.redteam.replay import replay_attacks, result_blocks, write_junit
    from nemotron4.redteam.session_report import attack_title
    from nemotron4.redteam.sessions import SessionStore
    from nemotron4.runs import held

    decider, opened = _judge(judge, judge_name, policy, is_raw=raw)
    settings = ReplaySettings(
        max_tokens=max_tokens, temperature=temperature, concurrency=concurrency, max_failures=max_failures
    )
    folder = out or database.with_name(f"{database.name}.replays")
    with SessionStore(database, create=False) as store, held(folder):
        model = connect(target, model_name)
        result = run_closing(replay_attacks(store, model, decider, settings, folder=folder), model, *opened)
        if junit is not None:
            titles = {each.session.id or "": attack_title(each.session) for each in store.sessions()}
            write_junit(result, junit, titles)
    present(result.to_json(), result_blocks(result), as_json=as_json)
    is_unjudged = bool(result.rows) and not result.judged and judge != "person"
    if result.count("still works") or is_unjudged:
        raise typer.Exit(1)


def _judge(
    judge: str, name: str | None, policy: Path | None, *, is_raw: bool
) -> tuple[AttackJudge, list[ChatModel]]:
    """Who judges, and the models that were opened for it."""
    from nemotron4.client.remote import JUDGE_KEY_VARIABLE, connect, is_address
    from nemotron4.errors import ConfigError
    from nemotron4.redteam import judges
    from nemotron4.text.content_safety import read_policy

    if judge == "person":
        return judges.person(), []
    if judge == "refusal":
        return judges.refusal_rule(), []
    if not is_address(judge):
        raise ConfigError(f"judge is {judge!r}; expected person, refusal or a URL")
    model = connect(judge, name, key_variable=JUDGE_KEY_VARIABLE)
    return judges.classifier(model, read_policy(policy), "raw" if is_raw else "chat"), [model]
