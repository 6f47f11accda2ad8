"""Where a row comes from: topic, prompt, revision, raw replies, scores and filters, from the ledger."""

from __future__ import annotations

from nemotron4.errors import DataError
from nemotron4.records import JsonObject
from nemotron4.synth.effects import STATE_NAMES
from nemotron4.synth.ledger import Reader


def find_record(ledger: Reader, prefix: str) -> bytes:
    """The one record whose id starts with the hexadecimal prefix."""
    found = ledger.find_ids(prefix)
    if not found:
        raise DataError(
            f"no record's id starts with {prefix!r}", hint="the ids stand in the exported rows, as `id`"
        )
    if len(found) > 1:
        shown = ", ".join(record.hex() for record in found)
        raise DataError(
            f"{len(found)} records' ids start with {prefix!r}: {shown}", hint="give more characters"
        )
    return found[0]


def ancestry(ledger: Reader, record: bytes) -> list[JsonObject]:
    """The record and its ancestors, the root first; each with row, replies and what was done to it."""
    steps: list[JsonObject] = []
    current: bytes | None = record
    made: str | None = None
    while current is not None:
        stage, parent, ordinal = ledger.parent(current)
        calls = [
            {
                "stage": reply.stage,
                "sample": reply.sample,
                "reply": reply.reply,
                "tokens": [reply.prompt_tokens, reply.completion_tokens],
                "latency_ms": reply.latency_ms,
                "attempts": reply.attempts,
            }
            for reply in ledger.replies_of(current)
            if made is None or reply.stage == made
        ]
        work = [
            {"stage": name, "state": STATE_NAMES[state], "class": reason_class, "reason": reason}
            for name, state, reason_class, reason in ledger.work_of(current)
        ]
        steps.append(
            {
                "id": current.hex(),
                "stage": stage,
                "ordinal": ordinal,
                "row": ledger.payload(current),
                "calls": calls,
                "work": work,
            }
        )
        current, made = parent, stage
    return steps[::-1]
