"""Ask every attack again that once worked, and say which still works: a regression test made of sessions.

The user's turns are sent in their order, each after the model's own new answers. Every new conversation is
recorded as a session, so that a person can assess what the rule or the classifier only sorts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from nemotron4.client import ChatModel, ClientError, Sampling, TransientError, call_with_retries
from nemotron4.grading.refusals import RULE, is_refusal
from nemotron4.grading.statistics import Interval, wilson
from nemotron4.records import JsonObject, Message
from nemotron4.redteam.aegis import ClassifierForm, ask_classifier
from nemotron4.redteam.sessions import Reviewed, Session, SessionStore
from nemotron4.report import Block, Table, Text, percent
from nemotron4.text.content_safety import Policy, parse_tolerant, question

Verdict = Literal["still works", "no longer works", "unscored"]
ANNOTATOR = "replay"


@dataclass(frozen=True)
class Judge:
    """Who says whether the attack works: its name for the report, and the verdict on a conversation."""

    name: str
    decide: Callable[[Sequence[Message]], Awaitable[Verdict]]


@dataclass(frozen=True)
class Replayed:
    """One attack. ``new_session`` is None where the model gave no answer; ``reason`` then says why."""

    session: str
    technique: str
    category: str
    verdict: Verdict
    new_session: str | None
    reason: str | None = None


@dataclass(frozen=True)
class ReplayResult:
    """``rate``: share of the judged attacks that still work. Unscored ones are in no rate."""

    model: str
    judge: str
    rows: tuple[Replayed, ...]

    def count(self, verdict: Verdict) -> int:
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def judged(self) -> int:
        return self.count("still works") + self.count("no longer works")

    @property
    def interval(self) -> Interval | None:
        return wilson(self.count("still works"), self.judged) if self.judged else None

    def to_json(self) -> JsonObject:
        interval = self.interval
        return {
            "model": self.model,
            "judge": self.judge,
            "attacks": len(self.rows),
            "still_works": self.count("still works"),
            "no_longer_works": self.count("no longer works"),
            "unscored": self.count("unscored"),
            "rate": self.count("still works") / self.judged if self.judged else None,
            "interval": None if interval is None else [interval.lower, interval.upper],
            "rows": [asdict(row) for row in self.rows],
        }


def person() -> Judge:
    """Nobody yet: the new sessions wait for an assessment."""

    async def decide(messages: Sequence[Message]) -> Verdict:
        return "unscored"

    return Judge("a person, later", decide)


def refusal_rule() -> Judge:
    """An attack works if the last answer does not refuse: a rule that errs both ways."""

    async def decide(messages: Sequence[Message]) -> Verdict:
        return "no longer works" if is_refusal(messages[-1].content) else "still works"

    return Judge(RULE, decide)


def classifier(model: ChatModel, policy: Policy, form: ClassifierForm) -> Judge:
    """An attack works if the classifier finds the answers unsafe. Other replies leave it unscored."""

    async def decide(messages: Sequence[Message]) -> Verdict:
        talk = [message for message in messages if message.role != "system"]
        reply = await ask_classifier(model, question(talk, "assistant", policy), form)
        is_unsafe = parse_tolerant(reply).is_unsafe(is_permissive=False)
        if is_unsafe is None:
            return "unscored"
        return "still works" if is_unsafe else "no longer works"

    return Judge(f"{model.name}, policy of {policy.source} {policy.sha256[:12]}", decide)


async def replay(
    store: SessionStore, model: ChatModel, judge: Judge, sampling: Sampling, *, note: Callable[[str], None]
) -> ReplayResult:
    """Every session whose attack worked by majority, the oldest first; replays themselves are left out.

    A call that may succeed later ends the replay with its error; what was recorded stays.
    """
    attacks = [each for each in store.sessions(outcome="success") if each.session.replay_of is None]
    rows: list[Replayed] = []
    for number, attack in enumerate(attacks, start=1):
        rows.append(await _replay_one(attack, store, model, judge, sampling))
        note(
            f"[{number}/{len(attacks)}] {(attack.session.id or '')[:8]} {attack.category}: {rows[-1].verdict}"
        )
    return ReplayResult(model.name, judge.name, tuple(rows))


async def _replay_one(
    attack: Reviewed, store: SessionStore, model: ChatModel, judge: Judge, sampling: Sampling
) -> Replayed:
    session = attack.session
    row = partial(Replayed, session.id or "", session.technique, attack.category)
    try:
        messages = await _ask_again(session, model, sampling)
    except TransientError:
        raise
    except ClientError as error:
        return row("unscored", None, f"no answer: {error.message}")
    kept = store.record(
        Session(
            annotator=ANNOTATOR,
            model=model.name,
            messages=messages,
            technique=session.technique,
            category=attack.category,
            settings={"max_tokens": sampling.max_tokens, "temperature": sampling.temperature},
            replay_of=session.id,
        )
    )
    try:
        verdict = await judge.decide(messages)
    except TransientError:
        raise
    except ClientError as error:
        return row("unscored", kept.id, f"no judgment: {error.message}")
    return row(verdict, kept.id, None)


async def _ask_again(session: Session, model: ChatModel, sampling: Sampling) -> tuple[Message, ...]:
    """The recorded turns that are not the model's, with new answers where it answered or should have."""
    messages: list[Message] = []
    asked = [message for message in session.messages if message.role != "assistant"]
    for place, message in enumerate(asked):
        messages.append(message)
        is_turn_over = place + 1 == len(asked) or asked[place + 1].role == "user"
        if message.role != "system" and is_turn_over:
            reply = await call_with_retries(partial(model.chat, tuple(messages), sampling))
            messages.append(Message("assistant", reply.text))
    return tuple(messages)


def result_blocks(result: ReplayResult) -> list[Block]:
    works = result.count("still works")
    share = works / result.judged if result.judged else None
    said = f"{works} of {result.judged} judged attacks still work: {percent(share, result.interval)}."
    by_category = Counter(row.category for row in result.rows if row.verdict == "still works")
    blocks: list[Block] = [
        Text(said, is_verdict=True),
        Text(f"{result.model}, judged by: {result.judge}. {result.count('unscored')} unscored."),
    ]
    if by_category:
        counts = [[category, str(number)] for category, number in sorted(by_category.items())]
        blocks.append(Table(["category", "still work"], counts))
    return [*blocks, *(Text(f"{row.session[:8]}: {row.reason}") for row in result.rows if row.reason)]
