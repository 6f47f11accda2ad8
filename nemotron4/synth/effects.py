"""What a finished piece of work leaves behind, and how content is packed for the ledger."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from nemotron4.records import JsonObject

READY, DONE, FAILED, FILTERED = range(4)
STATE_NAMES = ("ready", "done", "failed", "filtered")


@dataclass(frozen=True)
class Child:
    """A record to be stored. ``payload`` None stands for "the same row as my parent"."""

    stage: str
    ordinal: int
    payload: JsonObject | None
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
    """What one piece of work leaves behind: applied wholly or not at all."""

    stage: str
    record: bytes | None = None  # None: replies only, the work goes on
    state: int = READY
    cfg: bytes | None = None
    failure_class: str | None = None
    reason: str | None = None
    replies: list[StoredReply] = field(default_factory=list)
    children: list[Child] = field(default_factory=list)
    consumers: Sequence[str] = ()
    tally: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkItem:
    record: bytes
    attempt: int


def pack(value: Any) -> bytes:
    """JSON, deflated when that makes it shorter; the first byte tells which."""
    text = orjson.dumps(value)
    if len(text) > 160:
        packed = zlib.compress(text, 1)
        if len(packed) < len(text):
            return b"z" + packed
    return b"j" + text


def unpack(blob: bytes) -> Any:
    return orjson.loads(zlib.decompress(blob[1:]) if blob[:1] == b"z" else blob[1:])
