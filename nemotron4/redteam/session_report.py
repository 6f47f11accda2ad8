"""What sessions say: which attacks work, rows for training, and the items of the page of judgments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nemotron4.annotation.app import FOLDER, JudgmentRoutes, Listed, Shown, ShownAnswer, judgment_rows
from nemotron4.annotation.export import Export, check_form, collect, corrections, reward_sample
from nemotron4.annotation.figures import PairAgreement, agreements
from nemotron4.grading.statistics import Interval, wilson
from nemotron4.json_form import JsonForm
from nemotron4.records import JsonObject, Message, PreferencePair, RewardSample
from nemotron4.redteam.sessions import (
    CATEGORIES,
    OUTCOMES,
    TECHNIQUES,
    VOCABULARY,
    Reviewed,
    Session,
    SessionStore,
)
from nemotron4.report import Block, Table, Text, percent

UNASSESSED = "unassessed"
ExportForm = Literal["sessions", "preference", "reward", "judgments"]


@dataclass(frozen=True)
class AttackRate(JsonForm):
    """Attacks of one group. ``successes`` of ``assessed`` (success, partial and failure) worked.

    ``unclear`` and ``unassessed`` sessions are in no rate. ``rate`` is None when nothing was assessed.
    """

    group: str
    successes: int
    partial: int
    failures: int
    unclear: int
    unassessed: int
    also_written: ClassVar = {"assessed": "assessed", "rate": "rate", "interval": "interval"}

    @property
    def assessed(self) -> int:
        return self.successes + self.partial + self.failures

    @property
    def rate(self) -> float | None:
        return self.successes / self.assessed if self.assessed else None

    @property
    def interval(self) -> Interval | None:
        return wilson(self.successes, self.assessed) if self.assessed else None


@dataclass(frozen=True)
class SessionReport(JsonForm):
    """``by_month`` has one series for each technique and category, in the order of time."""

    total: AttackRate
    by_category: tuple[AttackRate, ...]
    by_technique: tuple[AttackRate, ...]
    by_month: tuple[AttackRate, ...]
    by_month_and_category: tuple[AttackRate, ...]
    by_month_and_technique: tuple[AttackRate, ...]
    by_model: tuple[AttackRate, ...]
    agreements: tuple[PairAgreement, ...]


def attack_rate(group: str, sessions: Iterable[Reviewed]) -> AttackRate:
    outcomes = [reviewed.outcome or UNASSESSED for reviewed in sessions]
    return AttackRate(group, *(outcomes.count(outcome) for outcome in (*OUTCOMES, UNASSESSED)))


def report(sessions: Sequence[Reviewed]) -> SessionReport:
    def grouped(key: Callable[[Reviewed], str]) -> tuple[AttackRate, ...]:
        names = sorted({key(each) for each in sessions})
        return tuple(attack_rate(name, [s for s in sessions if key(s) == name]) for name in names)

    return SessionReport(
        total=attack_rate("all", sessions),
        by_category=grouped(lambda each: each.category),
        by_technique=grouped(lambda each: each.session.technique),
        by_month=grouped(_month),
        by_month_and_category=grouped(lambda each: f"{_month(each)} {each.category}"),
        by_month_and_technique=grouped(lambda each: f"{_month(each)} {each.session.technique}"),
        by_model=grouped(lambda each: each.session.model),
        agreements=agreements([judgment for each in sessions for judgment in each.judgments], VOCABULARY),
    )


def _month(each: Reviewed) -> str:
    return (each.session.recorded_at or "")[:7]


def report_blocks(result: SessionReport) -> list[Block]:
    """The report for a reader: what worked, by group, and how far people agree."""
    total = result.total
    said = f"{total.successes} of {total.assessed} assessed attacks worked"
    said += f": {percent(total.rate, total.interval)}." if total.assessed else "."
    blocks: list[Block] = [
        Text(said, is_verdict=True),
        Text(f"{total.unclear} are unclear and {total.unassessed} are not assessed; they are in no rate."),
    ]
    columns = ["worked", "share", "partial", "unclear", "not assessed"]
    for name in ("category", "technique", "month", "model"):
        rows = [
            [
                each.group.replace("_", " "),
                f"{each.successes}/{each.assessed}",
                percent(each.rate, each.interval),
                each.partial,
                each.unclear,
                each.unassessed,
            ]
            for each in getattr(result, f"by_{name}")
        ]
        blocks.append(Table([name, *columns], rows, f"By {name}"))
    return [*blocks, *(pair.table() for pair in result.agreements)]


# --- rows for training


def export(sessions: Sequence[Reviewed], form: str) -> Export:
    """Rows of ``records.PreferencePair``, of ``records.RewardSample``, single judgments or whole sessions."""
    check_form(form, get_args(ExportForm))
    if form == "sessions":
        return Export(tuple(each.to_json() for each in sessions), {})
    if form == "judgments":
        return Export(judgment_rows([judgment for each in sessions for judgment in each.judgments]), {})
    if form == "reward":
        return collect([list(_reward_samples(each)) for each in sessions], "no rating")
    return collect(_preferences(sessions), "no better answer")


def _reward_samples(each: Reviewed) -> Iterator[RewardSample]:
    for place in each.session.answers:
        said = [judgment for judgment in each.judgments if judgment.answer == str(place)]
        messages, name = each.session.messages[: place + 1], f"{each.session.id}:{place}"
        sample = reward_sample(name, messages, said, {"model": each.session.model})
        if sample is not None:
            yield sample


def _preferences(sessions: Sequence[Reviewed]) -> Iterator[list[PreferencePair]]:
    """Bad answer against a better one: one that somebody wrote, or an answer to the same turns that resisted.

    The second kind is built only where the assessments are clear: the bad answer ends a session whose attack
    worked, the good one ends a session whose attack failed, after the same messages.
    """
    resisted: dict[str, Reviewed] = {}
    for each in sessions:
        if each.outcome == "failure" and each.session.messages[-1].role == "assistant":
            resisted.setdefault(_prompt_key(each.session.messages[:-1]), each)
    for each in sessions:
        messages, last = each.session.messages, len(each.session.messages) - 1
        found = []
        for place in each.session.answers:
            said = [judgment for judgment in each.judgments if judgment.answer == str(place)]
            name = f"{each.session.id}:{place}"
            for who, pair in corrections(name, messages[:place], messages[place].content, said, "better"):
                found.append(_labelled(pair, each, f"correction by {who}"))
        good = resisted.get(_prompt_key(messages[:-1]))
        if each.outcome == "success" and messages[last].role == "assistant" and good is not None:
            pair = PreferencePair(
                id=f"{each.session.id}:{last}",
                prompt=messages[:last],
                chosen=good.session.messages[-1].content,
                rejected=messages[last].content,
            )
            found.append(_labelled(pair, each, f"session {good.session.id}"))
        yield [replace(pair, id=f"{pair.id}:{number}") for number, pair in enumerate(found)]


def _labelled(pair: PreferencePair, each: Reviewed, source: str) -> PreferencePair:
    meta = {
        "model": each.session.model,
        "category": each.category,
        "technique": each.session.technique,
        "chosen_source": source,
    }
    return replace(pair, meta=meta)


def _prompt_key(messages: Sequence[Message]) -> str:
    return json.dumps([message.to_json() for message in messages])


# --- the page


class SessionSource:
    """Sessions as the items of the page, the newest first; groups are the categories that were tried."""

    title = "Red-team sessions"

    def __init__(self, store: SessionStore) -> None:
        self.store = store

    def groups(self) -> list[tuple[str, int]]:
        tried = [Session.from_json(row).category for row in self.store.items()]
        return [(name, tried.count(name)) for name in CATEGORIES if name in tried]

    def listed(self, group: str, after: str, annotator: str) -> Iterator[Listed]:
        rows = [Session.from_json(row) for row in reversed(self.store.items())]
        names = [row.id for row in rows]
        for session in rows[names.index(after) + 1 if after in names else 0 :]:
            if group in ("", session.category):
                yield Listed(
                    session.id or "", session.id or "", _Summary(session).summary, _Summary(session).text
                )

    def show(self, item: str, annotator: str) -> tuple[str, Shown]:
        session = self.store.session(item).session
        answers = [
            ShownAnswer(str(at), f"answer {at}", session.messages[at].content) for at in session.answers
        ]
        facts = {
            "technique": f"{session.technique}: {TECHNIQUES[session.technique]}",
            "tried": session.category,
            "model": session.model,
            "recorded by": session.annotator,
            "notes": session.notes,
        }
        shown = Shown(
            title=attack_title(session),
            messages=[message.to_json() for message in session.messages],
            answers=answers,
            facts={name: value for name, value in facts.items() if value},
        )
        return session.id or "", shown

    def answer_keys(self, item: str, annotator: str) -> dict[str, str]:
        return {str(at): str(at) for at in self.store.session(item).session.answers}

    def report(self) -> list[Block]:
        return report_blocks(report(self.store.sessions()))

    def figures(self) -> JsonObject:
        return report(self.store.sessions()).to_json()

    def export(self, form: str) -> Export:
        return export(self.store.sessions(), form)


@dataclass(frozen=True)
class _Summary:
    session: Session

    def summary(self) -> JsonObject:
        session = self.session
        facts = [session.category, session.technique, session.annotator, session.model]
        return {"title": attack_title(session), "facts": [*facts, (session.recorded_at or "")[:10]]}

    def text(self) -> str:
        return "\n".join(
            [*self.summary()["facts"], self.session.notes, *(m.content for m in self.session.messages)]
        )


def attack_title(session: Session) -> str:
    """What the attack was: the goal of an automatic one, else the attacker's own first words."""
    first = next(message.content for message in session.messages if message.role == "user")
    return " ".join(str(session.settings.get("goal") or first).split())[:120]


PAGE_SCRIPT = Path(__file__).parent / "web" / "redteam.js"  # draws the tab of the page over these routes


def session_routes(store: SessionStore) -> list[Route]:
    """The routes of the page over a store, and ``POST /items`` to record a session; the caller closes it."""

    def record(row: JsonObject) -> JsonObject:
        # The store gives both: a page cannot backdate a session or write over another one.
        return store.record(Session.from_json({**row, "id": None, "recorded_at": None})).to_json()

    async def vocabulary(request: Request) -> Response:
        """The words of a recorded session, with their meaning."""
        return JSONResponse({"techniques": dict(TECHNIQUES), "categories": dict(CATEGORIES)})

    return [Route("/vocabulary", vocabulary), *JudgmentRoutes(SessionSource(store), record).routes()]


def page_tab(store: SessionStore) -> dict[str, Any]:
    """The fields of the server page's tab over a store: ``server.page.PageTab``."""
    from fastapi import APIRouter

    router = APIRouter(include_in_schema=False)
    router.routes += [
        Route(f"/redteam{each.path}", each.endpoint, methods=list(each.methods or ()))
        for each in session_routes(store)
    ]
    files = [path for path in FOLDER.iterdir() if path.name not in ("index.html", "start.js", "alone.css")]
    return {"name": "redteam", "title": "Red team", "script": PAGE_SCRIPT, "router": router, "files": files}
