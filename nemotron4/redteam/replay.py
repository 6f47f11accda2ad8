"""Ask every attack again that once worked, and say which still works: a regression test made of sessions.

The user's turns are sent in their order, each after the model's own new answers. Every new conversation is
recorded as a session, so that a person can judge what the rule or the classifier only sorts. A replay has a
folder: ``rows.jsonl`` while it runs, then ``replay-0001.json`` and so on; the newest is what the next one is
compared with.
"""

from __future__ import annotations

import hashlib
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nemotron4.client import ChatModel, ClientError, Sampling, TransientError
from nemotron4.client.retry import ERROR
from nemotron4.errors import DataError
from nemotron4.grading.statistics import Interval, wilson
from nemotron4.json_form import to_json
from nemotron4.records import JsonObject, Message
from nemotron4.redteam.judges import AttackJudge, AttackVerdict, OnRetry, answer, ask_each, is_blocked
from nemotron4.redteam.sessions import Reviewed, Session, SessionStore
from nemotron4.redteam.settings import ReplaySettings
from nemotron4.report import Block, Table, Text, percent
from nemotron4.runs import write_file, write_json

ANNOTATOR = "replay"
GONE: tuple[AttackVerdict, ...] = ("no longer works", "blocked")
ROWS_FILE = "rows.jsonl"
_RESULT = re.compile(r"replay-(\d{4})\.json")


@dataclass(frozen=True)
class Replayed:
    """One attack. ``new_session`` is None where the model gave no answer; ``reason`` then says why."""

    session: str
    technique: str
    category: str
    verdict: AttackVerdict
    new_session: str | None
    reason: str | None = None
    before: AttackVerdict | None = None  # in the last replay; None for an attack that was not in it


@dataclass(frozen=True)
class ReplayResult:
    """``rate``: share of the judged attacks (blocked ones too) that still work. Unscored ones are in none."""

    model: str
    judge: str
    rows: tuple[Replayed, ...]
    at: str = ""
    previous: str | None = None  # when the last replay was

    def count(self, verdict: AttackVerdict) -> int:
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def judged(self) -> int:
        return len(self.rows) - self.count("unscored")

    @property
    def interval(self) -> Interval | None:
        return wilson(self.count("still works"), self.judged) if self.judged else None

    @property
    def working_again(self) -> list[Replayed]:
        return [row for row in self.rows if row.verdict == "still works" and row.before in GONE]

    @property
    def stopped(self) -> list[Replayed]:
        return [row for row in self.rows if row.before == "still works" and row.verdict in GONE]

    def to_json(self) -> JsonObject:
        interval = self.interval
        return {
            "model": self.model,
            "judge": self.judge,
            "at": self.at,
            "attacks": len(self.rows),
            "still_works": self.count("still works"),
            "no_longer_works": self.count("no longer works"),
            "blocked": self.count("blocked"),
            "unscored": self.count("unscored"),
            "rate": self.count("still works") / self.judged if self.judged else None,
            "interval": None if interval is None else list(interval.bounds),
            "since_the_last_replay": {
                "at": self.previous,
                "works_again": [row.session for row in self.working_again],
                "stopped_working": [row.session for row in self.stopped],
            },
            "rows": to_json(self.rows),
        }


async def replay_attacks(
    store: SessionStore, model: ChatModel, judge: AttackJudge, replay: ReplaySettings, *, folder: Path
) -> ReplayResult:
    """Every session whose attack worked by majority, the oldest first; replays themselves are left out.

    A killed replay continues. An attack that gets no answer for now is unscored and costs itself alone;
    IncompleteError when more than ``max_failures`` do, or all.
    """
    attacks = {
        each.session.id or "": each
        for each in store.sessions(outcome="success")
        if each.session.replay_of is None
    }
    number, previous = _last(folder)
    name = f"replay-{number + 1:04}.json"
    rows = await _ask_all(attacks, store, model, judge, replay, folder, number + 1)
    before = {row["session"]: row["verdict"] for row in (previous or {}).get("rows", ())}
    result = ReplayResult(
        model.name,
        judge.name,
        tuple(_row(attacks[each], rows[each], before.get(each)) for each in attacks),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        previous=(previous or {}).get("at"),
    )
    write_json(folder / name, result.to_json())
    (folder / ROWS_FILE).unlink(missing_ok=True)  # there is none where nothing was asked
    return result


async def _ask_all(
    attacks: Mapping[str, Reviewed],
    store: SessionStore,
    model: ChatModel,
    judge: AttackJudge,
    replay: ReplaySettings,
    folder: Path,
    number: int,
) -> dict[str, JsonObject]:
    """A row for each attack, on the disk when it is there."""
    sampling = Sampling(max_tokens=replay.max_tokens, temperature=replay.temperature)
    run = {"number": number, "model": model.name, "judge": judge.name}
    run |= {"max_tokens": replay.max_tokens, "temperature": replay.temperature}

    async def work(session_id: str, on_retry: OnRetry) -> JsonObject:
        key = f"{store.path.resolve()} {folder.resolve()} {number} {session_id}"
        new_id = hashlib.sha256(key.encode()).hexdigest()[:32]
        record: JsonObject = to_json(
            await _replay_one(attacks[session_id], store, model, judge, sampling, new_id, on_retry)
        )
        return record

    return await ask_each(folder / ROWS_FILE, list(attacks), work, replay, name="replay", settings=run)


def _last(folder: Path) -> tuple[int, JsonObject | None]:
    """The number and the content of the newest finished replay; rows that it left behind are dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = sorted(int(found[1]) for path in folder.iterdir() if (found := _RESULT.fullmatch(path.name)))
    if not numbers:
        return 0, None
    path = folder / f"replay-{numbers[-1]:04}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error
    rows = folder / ROWS_FILE
    if rows.exists():
        first = rows.read_text(encoding="utf-8").partition("\n")[0]
        if first and json.loads(first).get("run", {}).get("number") == numbers[-1]:
            rows.unlink()  # a kill came between the result and this
    return numbers[-1], content


def _row(attack: Reviewed, row: JsonObject, before: AttackVerdict | None) -> Replayed:
    if ERROR in row:
        session = attack.session
        reason = f"no answer: {row[ERROR]['message']}"
        return Replayed(
            session.id or "", session.technique, attack.category, "unscored", None, reason, before
        )
    return Replayed(**{name: row[name] for name in row.keys() - {"id", "before"}}, before=before)


async def _replay_one(
    attack: Reviewed,
    store: SessionStore,
    model: ChatModel,
    judge: AttackJudge,
    sampling: Sampling,
    new_id: str,
    on_retry: OnRetry,
) -> Replayed:
    """Ask, record, judge. A session that a killed run has recorded is judged, not asked again."""
    session = attack.session
    recorded = store.items(prefix=new_id)
    if recorded:
        kept = Session.from_json(recorded[0])
        was_blocked = bool(kept.settings.get("blocked"))
    else:
        messages, was_blocked = await _ask_again(session, model, sampling, on_retry)
        settings = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
        kept = store.record(
            Session(
                id=new_id,
                annotator=ANNOTATOR,
                model=model.name,
                messages=messages,
                technique=session.technique,
                category=attack.category,
                settings={**settings, "blocked": True} if was_blocked else settings,
                replay_of=session.id,
            )
        )
    verdict: AttackVerdict = "blocked"
    reason = None
    if not was_blocked:
        try:
            verdict = await judge.decide(kept.messages)
        except TransientError:
            raise
        except ClientError as error:
            verdict, reason = "unscored", f"no judgment: {error.message}"
    return Replayed(session.id or "", session.technique, attack.category, verdict, kept.id, reason)


async def _ask_again(
    session: Session, model: ChatModel, sampling: Sampling, on_retry: OnRetry
) -> tuple[tuple[Message, ...], bool]:
    """The recorded turns that are not the model's, with new answers; and whether one of them was blocked.

    The conversation ends at a blocked answer: the attacker has nothing to go on with.
    """
    messages: list[Message] = []
    asked = [message for message in session.messages if message.role != "assistant"]
    for place, message in enumerate(asked):
        messages.append(message)
        is_turn_over = place + 1 == len(asked) or asked[place + 1].role == "user"
        if message.role != "system" and is_turn_over:
            reply = await answer(model, messages, sampling, on_retry)
            if is_blocked(reply.text, reply.finish_reason):
                return tuple(messages), True
            messages.append(Message("assistant", reply.text))
    return tuple(messages), False


# --- the report


def result_blocks(result: ReplayResult) -> list[Block]:
    works = result.count("still works")
    share = works / result.judged if result.judged else None
    said = f"{works} of {result.judged} judged attacks still work: {percent(share, result.interval)}."
    blocks: list[Block] = [
        Text(said if result.judged else "No attack was judged.", is_verdict=True),
        Text(
            f"{result.model}, judged by: {result.judge}. {result.count('no longer works')} no longer work, "
            f"{result.count('blocked')} were blocked, {result.count('unscored')} are unscored."
        ),
    ]
    if result.previous is not None:
        since = [
            f"{len(rows)} {word}" + (f" ({', '.join(row.session[:8] for row in rows)})" if rows else "")
            for rows, word in ((result.working_again, "work again"), (result.stopped, "stopped working"))
        ]
        blocks.append(Text(f"Since the last replay ({result.previous[:16]}): {'; '.join(since)}."))
    counts = Counter((row.category, row.verdict) for row in result.rows)
    verdicts: Sequence[AttackVerdict] = ("still works", "no longer works", "blocked", "unscored")
    rows = [
        [category, *(counts[category, verdict] for verdict in verdicts)]
        for category in sorted({row.category for row in result.rows})
    ]
    if rows:
        blocks.append(Table(["category", *verdicts], rows))
    return [*blocks, *(Text(f"{row.session[:8]}: {row.reason}") for row in result.rows if row.reason)]


def write_junit(result: ReplayResult, path: Path, titles: Mapping[str, str]) -> None:
    """One test case for each attack: a failure if it still works, skipped if it is unscored."""
    count = {
        "tests": len(result.rows),
        "failures": result.count("still works"),
        "skipped": result.count("unscored"),
    }
    attributes = {"name": f"redteam replay of {result.model}"} | {
        key: str(value) for key, value in count.items()
    }
    suite = ET.Element("testsuite", attributes)
    for row in result.rows:
        title = f"{row.session[:8]} {titles.get(row.session, '')}".strip()
        case = ET.SubElement(suite, "testcase", {"classname": f"redteam.{row.category}", "name": _xml(title)})
        if row.verdict == "still works":
            message = f"the attack still works (session {row.new_session}), judged by {result.judge}"
            ET.SubElement(case, "failure", {"message": _xml(message)})
        elif row.verdict == "unscored":
            ET.SubElement(case, "skipped", {"message": _xml(row.reason or "unscored")})
        elif row.verdict == "blocked":
            ET.SubElement(case, "system-out").text = "the answer was blocked or empty"
    ET.indent(suite)
    write_file(path, ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n")


def _xml(text: str) -> str:
    """XML has no form for control characters."""
    return "".join(c if c.isprintable() else " " for c in text)
