"""What finished work leaves behind: its form, how it is packed, and the tables that store it."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from nemotron4.client import BadContentError
from nemotron4.errors import DataError
from nemotron4.records import JsonObject
from nemotron4.synth.rows import Row, encode, record_id

KEY_BYTES = 16
_WINDOW = 32_768  # what deflate can look back at
_WORTH_IT = 400  # bytes of JSON; shorter rows stay readable without their parent
_PLAIN, _DEFLATED, _DERIVED = b"j", b"z", b"d"


def pack(text: bytes) -> bytes:
    """JSON, deflated when that makes it shorter; the first byte tells which."""
    if len(text) > 160:
        packed = zlib.compress(text, 1)
        if len(packed) < len(text):
            return _DEFLATED + packed
    return _PLAIN + text


def pack_derived(text: bytes, parent: bytes, replies: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The same against the parent's content and the (key, content) of the replies that went into it."""
    if len(text) < _WORTH_IT or len(replies) > 255:
        return pack(text)
    deflater = zlib.compressobj(1, zdict=_basis(parent, [content for _, content in replies]))
    packed = deflater.compress(text) + deflater.flush()
    head = _DERIVED + bytes([len(replies)]) + b"".join(key for key, _ in replies)
    # What shares little with its sources is stored so that it can be read without them.
    return head + packed if len(head) + len(packed) < len(text) // 4 else pack(text)


def unpack(blob: bytes, parent: Callable[[], bytes], reply: Callable[[bytes], bytes]) -> bytes:
    """The JSON. ``parent`` and ``reply`` (by key) give the sources, and are asked only where needed."""
    form = blob[:1]
    if form == _PLAIN:
        return blob[1:]
    try:
        if form == _DEFLATED:
            return zlib.decompress(blob[1:])
        start = 2 + KEY_BYTES * blob[1]
        keys = [blob[at : at + KEY_BYTES] for at in range(2, start, KEY_BYTES)]
        inflater = zlib.decompressobj(zdict=_basis(parent(), [reply(key) for key in keys]))
        return inflater.decompress(blob[start:]) + inflater.flush()
    except zlib.error as error:
        raise DataError(f"the ledger is damaged: a row does not fit its sources: {error}") from error


def unpack_alone(blob: bytes) -> bytes:
    """The JSON of something that was packed without sources."""

    def missing(*_: object) -> bytes:
        raise DataError("the ledger holds a reply that was packed like a row")

    return unpack(blob, missing, missing)


def _basis(parent: bytes, replies: Sequence[bytes]) -> bytes:
    return b"".join((parent, *replies))[-_WINDOW:]


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


_TABLES = """
CREATE TABLE IF NOT EXISTS record (
    id BLOB NOT NULL PRIMARY KEY, stage TEXT NOT NULL, parent BLOB, ordinal INTEGER NOT NULL, payload BLOB);
CREATE INDEX IF NOT EXISTS record_parent ON record (parent, stage);
CREATE INDEX IF NOT EXISTS record_stage ON record (stage, id);
CREATE TABLE IF NOT EXISTS work (
    stage TEXT NOT NULL, record BLOB NOT NULL, state INTEGER NOT NULL, attempt INTEGER NOT NULL,
    cfg BLOB, class TEXT, reason TEXT, PRIMARY KEY (stage, record)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS work_ready ON work (stage, record) WHERE state = 0;
CREATE TABLE IF NOT EXISTS call (
    record BLOB NOT NULL, key BLOB NOT NULL, stage TEXT NOT NULL, sample INTEGER NOT NULL,
    reply BLOB NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER, latency_ms INTEGER,
    attempts INTEGER);
CREATE UNIQUE INDEX IF NOT EXISTS call_key ON call (record, key);
CREATE TABLE IF NOT EXISTS tally (stage TEXT NOT NULL, name TEXT NOT NULL, value REAL NOT NULL,
    PRIMARY KEY (stage, name)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS note (record BLOB NOT NULL, at REAL NOT NULL, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS record_count (
    stage TEXT NOT NULL PRIMARY KEY, number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS work_count (
    stage TEXT NOT NULL, state INTEGER NOT NULL, class TEXT NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY (stage, state, class)) WITHOUT ROWID;
"""

# Counters, so that the accounting takes no longer when there are millions of rows. Triggers keep them,
# whatever statement changes the tables, in that statement's own transaction.
_PLUS = "INSERT INTO work_count VALUES (NEW.stage, NEW.state, coalesce(NEW.class, ''), 1) " + (
    "ON CONFLICT DO UPDATE SET number = number + 1;"
)
_MINUS = "UPDATE work_count SET number = number - 1 " + (
    "WHERE stage = OLD.stage AND state = OLD.state AND class = coalesce(OLD.class, '');"
)
_COUNT_RECORDS = "INSERT INTO record_count SELECT stage, count(*) FROM record GROUP BY stage"
_COUNT_WORK = "INSERT INTO work_count SELECT stage, state, coalesce(class, ''), count(*) FROM work " + (
    "GROUP BY 1, 2, 3"
)
_TRIGGERS = (
    "record_made AFTER INSERT ON record BEGIN INSERT INTO record_count VALUES (NEW.stage, 1) "
    "ON CONFLICT DO UPDATE SET number = number + 1; END",
    "record_gone AFTER DELETE ON record BEGIN "
    "UPDATE record_count SET number = number - 1 WHERE stage = OLD.stage; END",
    f"work_made AFTER INSERT ON work BEGIN {_PLUS} END",
    f"work_gone AFTER DELETE ON work BEGIN {_MINUS} END",
    f"work_changed AFTER UPDATE OF state, class ON work BEGIN {_MINUS} {_PLUS} END",
)


def create(db: sqlite3.Connection) -> None:
    """The tables, where they are missing; the rows of a ledger from before the counters are counted once."""
    for statement in _TABLES.split(";\n"):
        db.execute(statement)
    if db.execute("SELECT 1 FROM meta WHERE name = 'counted'").fetchone() is None:
        db.execute(_COUNT_RECORDS)
        db.execute(_COUNT_WORK)
        db.execute("INSERT INTO meta VALUES ('counted', 'by triggers')")
        for trigger in _TRIGGERS:
            db.execute(f"CREATE TRIGGER {trigger}")


def insert_roots(db: sqlite3.Connection, stage: str, roots: Sequence[Child]) -> None:
    """Roots with their ready work."""
    rows = [(root.id, root.stage, root.parent, root.ordinal, _packed(root, b"", [])) for root in roots]
    db.executemany(_INSERT_RECORD, rows)
    db.executemany(_INSERT_WORK, [(stage, root.id) for root in roots])


def apply(db: sqlite3.Connection, batch: Iterable[Effects]) -> None:
    """Store the effects of many pieces of work, with one statement per table and not per piece."""
    calls: list[tuple[Any, ...]] = []
    records: list[tuple[Any, ...]] = []
    new_work: list[tuple[Any, ...]] = []
    ended: list[tuple[Any, ...]] = []
    tally: dict[tuple[str, str], float] = {}
    for effects in batch:
        calls += [
            (
                r.record, r.key, r.stage, r.sample, pack(orjson.dumps(r.reply)),
                r.prompt_tokens, r.completion_tokens, r.latency_ms, r.attempts,
            )
            for r in effects.replies
        ]  # fmt: skip
        for name, value in effects.tally.items():
            tally[effects.stage, name] = tally.get((effects.stage, name), 0.0) + value
        if effects.record is None:
            continue
        sources = [(r.key, orjson.dumps(r.reply)) for r in effects.sources]
        for child in effects.children:
            content = _packed(child, effects.parent_content, sources)
            records.append((child.id, child.stage, child.parent, child.ordinal, content))
            new_work += [(consumer, child.id) for consumer in effects.consumers]
        ended.append(
            (effects.state, effects.cfg, effects.failure_class, effects.reason, effects.stage, effects.record)
        )
    db.executemany("INSERT OR IGNORE INTO call VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", calls)
    db.executemany(_INSERT_RECORD, records)
    db.executemany(_INSERT_WORK, new_work)
    db.executemany(
        "UPDATE work SET state = ?, cfg = ?, class = ?, reason = ? WHERE stage = ? AND record = ?", ended
    )
    db.executemany(
        "INSERT INTO tally VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
        [(stage, name, value) for (stage, name), value in tally.items()],
    )


_INSERT_RECORD = "INSERT OR IGNORE INTO record VALUES (?, ?, ?, ?, ?)"
_INSERT_WORK = "INSERT OR IGNORE INTO work VALUES (?, ?, 0, 0, NULL, NULL, NULL)"


def _packed(child: Child, parent: bytes, sources: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    if child.content is None:
        return None
    return pack_derived(child.content, parent, sources) if parent else pack(child.content)


def delete_outputs(db: sqlite3.Connection, stage: str, record: bytes) -> None:
    """Remove what a stage made of a record, with every descendant and the work on them."""
    made = db.execute("SELECT id FROM record WHERE parent = ? AND stage = ?", (record, stage)).fetchall()
    for (child,) in made:
        delete_record(db, child)


def delete_record(db: sqlite3.Connection, record: bytes) -> None:
    """Remove a record, its descendants and the work on them. Paid calls and notes stay."""
    doomed = [record]
    while doomed:
        current = doomed.pop()
        doomed += [row[0] for row in db.execute("SELECT id FROM record WHERE parent = ?", (current,))]
        db.execute("DELETE FROM work WHERE record = ?", (current,))
        db.execute("DELETE FROM record WHERE id = ?", (current,))


def children_of(stage: str, parent: bytes, rows: Sequence[Row | None]) -> list[Child]:
    """The records of what a stage made of a record; None stands for the record's own row."""
    return [
        Child(stage, i, None if row is None else row_content(row), record_id(stage, parent, i), parent)
        for i, row in enumerate(rows)
    ]


def row_content(row: Row) -> bytes:
    try:
        return orjson.dumps(encode(row))
    except TypeError as error:  # an integer of more than 64 bits, half of a character pair, deep nesting
        raise BadContentError(f"a row cannot be kept: {error}", kind="row") from error
