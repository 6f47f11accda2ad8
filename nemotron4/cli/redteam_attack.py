"""What ``nemotron4 redteam attack`` does once its options are read."""

from __future__ import annotations

from pathlib import Path

from nemotron4.cli.console import note, print_json
from nemotron4.client.remote import JUDGE_KEY_VARIABLE, KEY_VARIABLE, connect
from nemotron4.errors import ConfigError, unknown_name
from nemotron4.redteam.attack_report import summary_blocks, write_report
from nemotron4.redteam.attacks import (
    METHODS,
    GoalResult,
    attack_goals,
    read_goals,
    record_sessions,
    report_goals,
)
from nemotron4.redteam.sessions import SessionStore
from nemotron4.redteam.settings import AttackSettings
from nemotron4.report import print_report
from nemotron4.runs import held, run_stoppable

ATTACKER_KEY_VARIABLE = "NEMOTRON4_ATTACKER_API_KEY"


def run_attack(
    settings: AttackSettings,
    addresses: tuple[str, str, str],
    goals: Path | None,
    out: Path,
    sessions: Path | None,
    *,
    as_json: bool,
) -> None:
    """``addresses``: target, attacker and judge."""
    if settings.method not in METHODS:
        message, hint = unknown_name("method", settings.method, METHODS)
        raise ConfigError(message, hint=hint)
    asked = report_goals() if goals is None else read_goals(goals)
    keys = (KEY_VARIABLE, ATTACKER_KEY_VARIABLE, JUDGE_KEY_VARIABLE)
    models = [connect(url, None, key_variable=key) for url, key in zip(addresses, keys, strict=True)]
    target, attacker, judge = models

    async def run() -> list[GoalResult]:
        try:
            return await attack_goals(asked, settings, out=out, target=target, attacker=attacker, judge=judge)
        finally:
            for model in models:
                await model.close()

    with held(out):
        results = run_stoppable(run())
        names = {"model": target.name, "attacker": attacker.name, "judge": judge.name}
        written = write_report(results, settings, out, **names)
    if sessions is not None:
        with SessionStore(sessions) as store:
            number = record_sessions(store, results, settings, model=target.name, judge=judge.name)
        note(f"{number} sessions recorded in {sessions}")
    if as_json:
        print_json({**names, "method": settings.method, "goals": [each.to_json() for each in results]})
    else:
        print_report(summary_blocks(results, settings, target.name))
    note(f"wrote {', '.join(map(str, written))}")
