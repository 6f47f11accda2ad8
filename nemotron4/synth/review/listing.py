"""Pages of a run's rows for the table: in the order of ids, filtered by stage, text and state of review."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import orjson

from nemotron4.records import JsonObject
from nemotron4.synth.ledger import Reader
from nemotron4.synth.review.notes import Review
from nemotron4.synth.rows import Answered, Dialogue, Document, JudgedPair, Prompt, Root, Row, Topic, decode

State = Literal["all", "open", "accepted", "rejected", "edited", "commented"]
STATES: tuple[State, ...] = ("all", "open", "accepted", "rejected", "edited", "commented")
PAGE_ROWS = 50
# A search that finds little ends after so many rows and goes on with the next page, so it never hangs.
PAGE_SCANNED = 20_000


@dataclass(frozen=True)
class Page:
    """``after`` is where the next page starts; None at the end."""

    rows: Sequence[JsonObject]
    after: str | None
    num_scanned: int


def list_rows(
    ledger: Reader,
    stages: Sequence[str],
    reviews: Mapping[bytes, Sequence[Review]],
    *,
    search: str = "",
    state: State = "all",
    after: str = "",
) -> Page:
    """Rows of the stages, one after the other; ``after`` is the cursor of the page before."""
    wanted = search.casefold()
    found: list[JsonObject] = []
    num_scanned = 0
    for cursor, stage, record in _records(ledger, stages, after):
        num_scanned += 1
        own = reviews.get(record, ())
        if is_in_state(own, state):
            content = ledger.content(record)
            row = decode(orjson.loads(content))
            if wanted in searched_text(row).casefold() or record.hex().startswith(wanted):
                found.append({"id": record.hex(), "stage": stage, **summary(row), "state": state_word(own)})
        if len(found) == PAGE_ROWS or num_scanned == PAGE_SCANNED:
            return Page(found, cursor, num_scanned)
    return Page(found, None, num_scanned)


def _records(ledger: Reader, stages: Sequence[str], after: str) -> Iterator[tuple[str, str, bytes]]:
    """(cursor, stage, record) beyond a cursor, which names stage and record."""
    first, _, last = after.partition("/")
    at = stages.index(first) if first in stages else 0
    for place, stage in enumerate(stages[at:]):
        start = bytes.fromhex(last) if last and place == 0 else b""
        for record in ledger.records_of(stage, after=start):
            yield f"{stage}/{record.hex()}", stage, record


def is_in_state(reviews: Sequence[Review], state: State) -> bool:
    if state == "all":
        return True
    if state == "open":
        return not any(review.verdict or review.preferred for review in reviews)
    if state == "edited":
        return any(review.edits for review in reviews)
    if state == "commented":
        return any(review.comment for review in reviews)
    return state_word(reviews) == state


def state_word(reviews: Sequence[Review]) -> str:
    """One word for the table: a rejection by anyone stands."""
    verdicts = {review.verdict for review in reviews}
    if "reject" in verdicts:
        return "rejected"
    return "accepted" if "accept" in verdicts else "open"


def summary(row: Row) -> JsonObject:
    """What the table shows of a row."""
    shown: JsonObject = {"kind": type(row).__name__.lower(), "title": title(row)}
    if isinstance(row, JudgedPair):
        shown |= {"task": row.prompt.task, "judge": row.judge}
        if row.chosen_reward is not None and row.rejected_reward is not None:
            shown["gap"] = row.chosen_reward - row.rejected_reward
    elif isinstance(row, Answered):
        shown["task"] = row.prompt.task
    elif isinstance(row, Prompt | Dialogue):
        shown["task"] = row.task
    return shown


def title(row: Row) -> str:
    """The row's own words in one line."""
    match row:
        case JudgedPair() | Answered():
            text = row.prompt.text
        case Prompt():
            text = row.text
        case Dialogue():
            text = next(message.content for message in row.messages if message.role == "user")
        case Topic():
            text = row.topic
        case Document():
            text = row.text
        case Root():
            text = f"number {row.index}"
    return " ".join(text.split())[:200]


def searched_text(row: Row) -> str:
    """Everything in a row that a person wrote or read."""
    match row:
        case JudgedPair():
            return "\n".join((searched_text(row.prompt), row.chosen.text, row.rejected.text))
        case Answered():
            return "\n".join((searched_text(row.prompt), *(response.text for response in row.responses)))
        case Prompt() | Dialogue():
            return "\n".join((row.task, row.topic or "", *(message.content for message in row.messages)))
        case Topic():
            return "\n".join((row.topic, row.above or ""))
        case Document():
            return row.text
        case Root():
            return str(row.entry)
