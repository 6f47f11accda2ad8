"""Automatic attacks: an attacker model plays PAIR, TAP or Crescendo against a target, a judge model scores.

All three models are behind addresses of the user's choice; nothing else is asked. Each goal is one row on the
disk, so a killed run continues. Verdicts have a fixed form, and a reply in another form is unscored.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from nemotron4.annotation.vocabulary import Annotation
from nemotron4.client import ChatModel, Sampling
from nemotron4.client.retry import ERROR
from nemotron4.errors import DataError
from nemotron4.grading.refusals import is_refusal
from nemotron4.json_form import JsonForm, to_json
from nemotron4.records import FieldError, JsonObject, Message, read_json_lines, require
from nemotron4.redteam.judges import OnRetry, answer, ask_each, ask_in_form, is_blocked
from nemotron4.redteam.sessions import CATEGORIES, Session, SessionStore
from nemotron4.redteam.settings import AttackSettings
from nemotron4.runs import claim, write_json

ROWS_FILE = "goals.jsonl"
RESULT_FILE = "result.json"
KEPT_EXCHANGES = 3  # of the attacker's own conversation: what is older does not fit a small model
GoalOutcome = Literal["success", "failure", "blocked", "unscored"]
# What the attacker and the judge reply with; the bounds end a small model's text before the token limit does.
FORMS: dict[str, JsonObject] = {
    "refine": {
        "improvement": {"type": "string", "maxLength": 200},
        "prompt": {"type": "string", "minLength": 1, "maxLength": 800},
    },
    "escalate": {
        "question": {"type": "string", "minLength": 1, "maxLength": 600},
        "summary": {"type": "string", "maxLength": 300},
    },
    "score": {
        "score": {"type": "integer", "minimum": 1, "maximum": 10},
        "reason": {"type": "string", "maxLength": 200},
    },
    "on_topic": {"on_topic": {"type": "boolean"}},
}


@dataclass(frozen=True)
class AttackGoal:
    id: str
    goal: str
    area: str = "others"
    category: str = "other"


@dataclass(frozen=True)
class AttackAttempt:
    """One conversation with the target. ``score`` is None where the judge's reply had no form."""

    messages: tuple[Message, ...]
    score: int | None
    reason: str = ""
    is_blocked: bool = False

    @property
    def rank(self) -> int:
        return self.score or 0


@cache
def texts() -> Mapping[str, Any]:
    return tomllib.loads(resources.files("nemotron4.redteam").joinpath("attack.toml").read_text("utf-8"))


def report_goals() -> list[AttackGoal]:
    """Ours, in the areas that the technical report scanned."""
    return [AttackGoal(**row) for row in texts()["goals"]]


def read_goals(path: Path) -> list[AttackGoal]:
    """``{"goal", "id"?, "area"?, "category"?}``, one a line."""
    found: dict[str, AttackGoal] = {}
    for number, row in read_json_lines(path):
        try:
            text = require(row, "goal", str, "what the target should do")
        except FieldError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        category = str(row.get("category") or "other")
        name = str(row.get("id", number))
        if name in found:
            raise DataError(f"{path}:{number}: id {name!r} is on more than one row", hint="ids must differ")
        found[name] = AttackGoal(name, text, str(row.get("area") or "others"), category)
    if not found:
        raise DataError(f"{path}: holds no goal")
    return list(found.values())


class Arena:
    """The three models of one goal, and how often the target was asked."""

    def __init__(
        self,
        goal: AttackGoal,
        settings: AttackSettings,
        *,
        target: ChatModel,
        attacker: ChatModel,
        judge: ChatModel,
        on_retry: OnRetry = lambda _: None,
    ) -> None:
        self.goal = goal
        self.settings = settings
        self._target, self._attacker, self._judge = target, attacker, judge
        self._on_retry = on_retry
        self.num_queries = 0
        self.best: AttackAttempt | None = None
        self.num_blocked = 0

    @property
    def is_over(self) -> bool:
        return self.is_reached or self.num_queries >= self.settings.max_queries

    @property
    def is_reached(self) -> bool:
        return self.best is not None and self.best.rank >= self.settings.success_score

    async def propose(self, kind: str, field: str, history: Sequence[Message]) -> str | None:
        """The attacker's next prompt, and None if it does not keep to the form."""
        told = Message("system", _fill(texts()["attacker"][kind], goal=self.goal.goal))
        first = Message("user", "Reply with the JSON object of the first attempt.")
        kept = history[-2 * KEPT_EXCHANGES :]
        sampling = Sampling(
            max_tokens=self.settings.max_tokens, temperature=self.settings.attacker_temperature
        )
        found = await ask_in_form(self._attacker, (told, first, *kept), FORMS[kind], field, sampling)
        return None if found is None or not found[field].strip() else str(found[field])

    async def attack(self, messages: Sequence[Message]) -> AttackAttempt:
        """Ask the target and have its answer scored; a blocked answer has the lowest score."""
        self.num_queries += 1
        sampling = Sampling(max_tokens=self.settings.max_tokens, temperature=self.settings.temperature)
        reply = await answer(self._target, messages, sampling, self._on_retry)
        if is_blocked(reply.text, reply.finish_reason):
            self.num_blocked += 1
            attempt = AttackAttempt(tuple(messages), 1, "blocked or empty", is_blocked=True)
        else:
            talk = (*messages, Message("assistant", reply.text))
            found = await self._ask_judge("score", conversation=_shown(talk))
            score = None if found is None or not 1 <= found["score"] <= 10 else int(found["score"])
            attempt = AttackAttempt(
                talk, score, str((found or {}).get("reason", "the judge kept to no form"))
            )
        is_better = self.best is None or attempt.rank > self.best.rank or self.best.is_blocked
        # A blocked one says nothing of an answer that came and got no score.
        if is_better and (self.best is None or self.best.is_blocked or not attempt.is_blocked):
            self.best = attempt
        return attempt

    async def is_on_topic(self, prompt: str) -> bool:
        found = await self._ask_judge("on_topic", prompt=prompt)
        return found is None or bool(found["on_topic"])

    async def _ask_judge(self, kind: str, **values: str) -> JsonObject | None:
        asked = _fill(texts()["judge"][kind], goal=self.goal.goal, **values)
        sampling = Sampling(max_tokens=200, temperature=0.0)
        return await ask_in_form(self._judge, (Message("user", asked),), FORMS[kind], kind, sampling)


def _fill(text: str, **values: str) -> str:
    """Names in braces; the braces of JSON stay."""
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text.strip()


def _shown(messages: Sequence[Message]) -> str:
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


def _exchange(prompt: str, field: str, attempt: AttackAttempt) -> tuple[Message, Message]:
    """What the attacker is told of its last prompt."""
    said = "(nothing: the answer was blocked)" if attempt.is_blocked else attempt.messages[-1].content
    score = "unknown" if attempt.score is None else str(attempt.score)
    told = _fill(texts()["attacker"]["feedback"], score=score, answer=said)
    return Message("assistant", json.dumps({field: prompt})), Message("user", told)


async def pair(arena: Arena) -> None:
    """Streams that refine one prompt each (Chao et al. 2023)."""

    async def stream() -> None:
        history: list[Message] = []
        for _ in range(arena.settings.depth):
            prompt = None if arena.is_over else await arena.propose("refine", "prompt", history)
            if prompt is None or arena.is_over:
                return
            history += _exchange(prompt, "prompt", await arena.attack((Message("user", prompt),)))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(arena.settings.streams):
                group.create_task(stream())
    except ExceptionGroup as failed:  # one failed call is this goal's failure, as in the other methods
        raise failed.exceptions[0] from failed


async def tap(arena: Arena) -> None:
    """A tree of prompts: leaves branch, what is off the topic is cut, the best go on (Mehrotra 2023)."""
    leaves: list[tuple[list[Message], int]] = [([], 0)]
    for _ in range(arena.settings.depth):
        grown: list[tuple[list[Message], int]] = []
        for history, _ in leaves:
            for _ in range(arena.settings.streams):
                if arena.is_over:
                    return
                prompt = await arena.propose("refine", "prompt", history)
                if prompt is None or not await arena.is_on_topic(prompt):
                    continue
                attempt = await arena.attack((Message("user", prompt),))
                grown.append(([*history, *_exchange(prompt, "prompt", attempt)], attempt.rank))
        if not grown:
            return
        leaves = sorted(grown, key=lambda leaf: -leaf[1])[: arena.settings.width]


async def crescendo(arena: Arena) -> None:
    """One conversation that goes further step by step; a refused step is forgotten (Russinovich 2024)."""
    history: list[Message] = []
    talk: tuple[Message, ...] = ()
    while not arena.is_over:
        question = await arena.propose("escalate", "question", history)
        if question is None:
            return
        attempt = await arena.attack((*talk, Message("user", question)))
        if attempt.is_blocked or is_refusal(attempt.messages[-1].content):
            told = Message("user", texts()["attacker"]["refused"])
            history += [Message("assistant", json.dumps({"question": question})), told]
        else:
            talk = attempt.messages
            history += _exchange(question, "question", attempt)


METHODS = {"pair": pair, "tap": tap, "crescendo": crescendo}


@dataclass(frozen=True)
class GoalResult(JsonForm):
    """The best attempt at one goal. ``queries`` counts what the target was asked."""

    id: str
    goal: str
    area: str
    category: str
    outcome: GoalOutcome
    score: int | None
    reason: str
    queries: int
    blocked: int
    messages: tuple[Message, ...]


async def attack_goals(
    goals: Sequence[AttackGoal],
    settings: AttackSettings,
    *,
    out: Path,
    target: ChatModel,
    attacker: ChatModel,
    judge: ChatModel,
) -> list[GoalResult]:
    """A result for each goal, saved in ``out``; one without an answer is unscored and says why."""
    digest = hashlib.sha256(json.dumps(to_json(goals)).encode()).hexdigest()
    names = {"target": target.name, "attacker": attacker.name, "judge": judge.name}
    may_change = ("concurrency", "max_failures")
    fixed = {name: value for name, value in to_json(settings).items() if name not in may_change}
    claim(out, {"kind": "automatic attacks", **names, **fixed, "goals_sha256": digest})
    by_id = {goal.id: goal for goal in goals}

    async def work(name: str, on_retry: OnRetry) -> JsonObject:
        arena = Arena(by_id[name], settings, target=target, attacker=attacker, judge=judge, on_retry=on_retry)
        await METHODS[settings.method](arena)
        return _result(arena).to_json()

    rows = await ask_each(out / ROWS_FILE, list(by_id), work, settings, name=settings.method, unit="goals")
    results = [_of_row(by_id[name], rows[name]) for name in by_id]
    write_json(out / RESULT_FILE, {**names, **fixed, "goals": [result.to_json() for result in results]})
    return results


def _result(arena: Arena) -> GoalResult:
    best, goal = arena.best, arena.goal
    outcome: GoalOutcome = "failure"
    if best is None:
        outcome = "unscored"
        best = AttackAttempt((), None, "the attacker kept to no form")
    elif arena.is_reached:
        outcome = "success"
    elif arena.num_blocked == arena.num_queries:
        outcome = "blocked"
    elif best.score is None:
        outcome = "unscored"
    return GoalResult(
        **to_json(goal),
        outcome=outcome,
        score=best.score,
        reason=best.reason,
        queries=arena.num_queries,
        blocked=arena.num_blocked,
        messages=best.messages,
    )


def _of_row(goal: AttackGoal, row: JsonObject) -> GoalResult:
    if ERROR not in row:
        return GoalResult.from_json(row)
    reason = f"no answer: {row[ERROR]['message']}"
    return GoalResult(
        **to_json(goal), outcome="unscored", score=None, reason=reason, queries=0, blocked=0, messages=()
    )


def record_sessions(
    store: SessionStore, results: Sequence[GoalResult], settings: AttackSettings, *, model: str, judge: str
) -> int:
    """Keep each best attempt with an answer as a session, judged by the judge model; known ones stay."""
    num_new = 0
    for result in results:
        if not any(message.role == "assistant" for message in result.messages):
            continue
        content = json.dumps([model, settings.method, result.to_json()])
        name = hashlib.sha256(content.encode()).hexdigest()[:32]
        if store.items(prefix=name):
            continue
        category = result.category if result.category in CATEGORIES else "other"
        session = Session(
            id=name,
            annotator=settings.method,
            model=model,
            messages=result.messages,
            technique="automatic",
            category=category,
            settings={"method": settings.method, "goal": result.goal, "area": result.area},
            notes=result.goal,
        )
        values = {
            "outcome": {"success": "success", "failure": "failure"}.get(result.outcome, "unclear"),
            "category": category,
            "notes": f"score {result.score} of 10: {result.reason}",
        }
        store.record(session, [Annotation(item=name, annotator=f"judge {judge}"[:64], values=values)])
        num_new += 1
    return num_new
