"""Automatic attacks as a report: the verdict, the areas in the same table as a garak scan, what worked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemotron4.grading.statistics import wilson
from nemotron4.plots import draw_bars
from nemotron4.redteam.attacks import GoalResult
from nemotron4.redteam.settings import AttackSettings
from nemotron4.report import Bar, Bars, Block, Folded, Heading, Table, Text, percent
from nemotron4.report import write_report as write_files

PICTURE = "areas.png"
OUTCOMES = ("success", "failure", "blocked", "unscored")


def summary_blocks(results: Sequence[GoalResult], settings: AttackSettings, model: str) -> list[Block]:
    """What a reader at a terminal sees; the report begins with it."""
    reached = [result for result in results if result.outcome == "success"]
    judged = [result for result in results if result.outcome != "unscored"]
    share = len(reached) / len(judged) if judged else None
    span = wilson(len(reached), len(judged)) if judged else None
    said = (
        f"{model}: {settings.method} reached {len(reached)} of {len(judged)} goals, {percent(share, span)}."
    )
    asked = sorted(result.queries for result in reached)
    middle = f" Half of them took {asked[len(asked) // 2]} prompts or fewer." if asked else ""
    blocked = sum(result.outcome == "blocked" for result in results)
    unscored = len(results) - len(judged)
    return [
        Text(said if judged else f"{model}: nothing was judged.", is_verdict=True),
        Text(f"{blocked} goals met blocked answers only, {unscored} are unscored.{middle}"),
        _areas(results),
    ]


def _areas(results: Sequence[GoalResult]) -> Table:
    rows = []
    for area in dict.fromkeys(result.area for result in results):
        counts = _counts(results, area)
        judged = sum(counts[:3])
        passed = (judged - counts[0]) / judged if judged else None
        shown = percent(passed, wilson(judged - counts[0], judged) if judged else None)
        rows.append([area.replace("_", " "), shown, f"{judged - counts[0]}/{judged}", *map(str, counts)])
    columns = [
        "area", "pass rate, 95 % interval", "passed", "attacks that worked", "attacks that failed",
        "blocked", "no verdict",
    ]  # fmt: skip
    return Table(columns, rows)


def _counts(results: Sequence[GoalResult], area: str) -> list[int]:
    said = [str(result.outcome) for result in results if result.area == area]
    return [said.count(outcome) for outcome in OUTCOMES]


def area_bars(results: Sequence[GoalResult], model: str) -> Bars:
    bars = []
    for area in dict.fromkeys(result.area for result in results):
        counts = _counts(results, area)
        judged, worked = sum(counts[:3]), counts[0]
        name = area.replace("_", " ")
        if not judged:
            bars.append(Bar(name, None, label="no verdict"))
            continue
        span, value = wilson(judged - worked, judged), 100 * (judged - worked) / judged
        label = f"{value:.1f} % ({judged - worked}/{judged})"
        bars.append(Bar(name, value, 100 * span.lower, 100 * span.upper, label))
    return Bars(f"Goals that {model} withstood", "% of the goals (higher is safer)", bars, 100, PICTURE)


def report_blocks(
    results: Sequence[GoalResult], settings: AttackSettings, *, model: str, attacker: str, judge: str
) -> list[Block]:
    blocks: list[Block] = [
        Heading(f"{settings.method} against {model}", 1),
        *summary_blocks(results, settings, model),
        area_bars(results, model),
        Text(
            f"Attacker: {attacker}. Judge: {judge}, from 1 to 10; {settings.success_score} or more is a goal "
            f"reached. At most {settings.max_queries} prompts for each goal. Another attacker or judge is "
            "another measurement. Blocked answers are empty, or a guard stopped them."
        ),
        Heading("Every goal"),
        Table(
            ["goal", "area", "outcome", "score", "prompts", "blocked", "why"],
            [
                [
                    result.goal,
                    result.area.replace("_", " "),
                    result.outcome,
                    "-" if result.score is None else result.score,
                    result.queries,
                    result.blocked,
                    result.reason,
                ]
                for result in results
            ],
        ),
    ]
    blocks.append(
        Text(
            "Content warning: what follows are attacks and what the model answered, word for word. Each is "
            "folded; open one only if you need to see it."
        )
    )
    titles = {True: "Attacks that worked", False: "The best attempts at goals that were not reached"}
    for is_worked, title in titles.items():
        shown = [
            Folded(result.goal, [(m.role, m.content) for m in result.messages])
            for result in results
            if result.messages and (result.outcome == "success") == is_worked
        ]
        blocks += [Heading(title), *shown] if shown else []
    return blocks


def write_report(
    results: Sequence[GoalResult],
    settings: AttackSettings,
    folder: Path,
    *,
    model: str,
    attacker: str,
    judge: str,
) -> list[Path]:
    picture = draw_bars(area_bars(results, model), folder / PICTURE)
    blocks = report_blocks(results, settings, model=model, attacker=attacker, judge=judge)
    return [*write_files(folder, f"{settings.method} against {model}", blocks), picture]
