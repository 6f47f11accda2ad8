"""What a finished piece of work leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemotron4.records import JsonObject

READY, DONE, FAILED, FILTERED = range(4)
STATE_NAMES = ("ready", "done", "failed", "filtered")


@dataclass(frozen=True)
class Child:
    """A record to be stored. ``content`` is its row as JSON; None stands for "the same row as my parent"."""

    stage: str
    ordinal: int
    content: bytes | None
    id: bytes
    parent: bytes | None


@dataclass(frozen=True)
class StoredReply:
    """A paid call as the ledger keeps it."""

    record: bytes
    key: bytes
    stage: str
    sample: int
    reply: JsonObject
    prompt_tokens: int | None
    completion_tokens: int | None
    latency_ms: int
    attempts: int


@dataclass
class Effects:
    """What one piece of work leaves behind: applied wholly or not at all.

    ``parent_content`` and ``sources`` are what the children were made from: their parent and every reply
    of this work, also those stored earlier.
    """

    stage: str
    record: bytes | None = None  # None: replies only, the work goes on
    state: int = READY
    cfg: bytes | None = None
    failure_class: str | None = None
    reason: str | None = None
    replies: list[StoredReply] = field(default_factory=list)
    children: list[Child] = field(default_factory=list)
    parent_content: bytes = b""
    sources: Sequence[StoredReply] = ()
    consumers: Sequence[str] = ()
    tally: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkItem:
    record: bytes
    attempt: int
