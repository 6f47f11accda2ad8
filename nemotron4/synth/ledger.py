"""The ledger of a run: one SQLite file (write-ahead log) that holds records, work, calls and spending.

A *record* is what a stage made of its parent record. *Work* is one stage applied to one record; it is ready,
done, failed (with class and reason) or filtered (with rule). A *call* is a paid reply. One thread writes;
everything a finished piece of work leaves behind goes into one transaction, and many pieces share one commit.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from nemotron4.errors import DataError, Nemotron4Error
from nemotron4.records import JsonObject
from nemotron4.synth.rows import ID_BYTES
from nemotron4.synth.tables import FAILED, STATE_NAMES, StoredReply, WorkItem, unpack, unpack_alone

SCHEMA_VERSION = 1


class LedgerError(Nemotron4Error):
    """The ledger cannot be opened or written: another run holds it, the disk is full, the file is not one."""


def connect(path: Path, *, is_read_only: bool) -> sqlite3.Connection:
    mode = "ro" if is_read_only else "rwc"
    connection = sqlite3.connect(
        f"file:{path}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA busy_timeout = 10000")
    return connection


class Reader:
    """Read access to a ledger, also while a run writes it."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataError(
                f"{path}: there is no ledger here", hint="name the folder given to `synth run --out`"
            )
        self.path = path
        self._db = connect(path, is_read_only=True)
        try:
            self._check_version()
        except BaseException:
            self._db.close()
            raise

    def _check_version(self) -> None:
        try:
            version = self.meta("schema")
        except sqlite3.DatabaseError as error:
            raise DataError(f"{self.path}: not a ledger: {error}") from error
        if version != str(SCHEMA_VERSION):
            raise DataError(f"{self.path}: the ledger has form {version}; expected {SCHEMA_VERSION}")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def meta(self, name: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def payload(self, record: bytes) -> JsonObject:
        """The row of a record, taken from the nearest ancestor that has one."""
        value: JsonObject = orjson.loads(self.content(record))
        return value

    def content(self, record: bytes) -> bytes:
        """The same as JSON text."""
        wanted: bytes | None = record
        while wanted is not None:
            row = self._db.execute("SELECT payload, parent FROM record WHERE id = ?", (wanted,)).fetchone()
            if row is None:
                raise DataError(f"{self.path}: record {wanted.hex()} is missing")
            blob, parent = row
            if blob is not None:
                sources = partial(self.content, parent), partial(self._reply_content, parent)
                return unpack(blob, *sources)
            wanted = parent
        raise DataError(f"{self.path}: record {record.hex()} and its ancestors have no content")

    def _reply_content(self, record: bytes, key: bytes) -> bytes:
        found = self._db.execute("SELECT reply FROM call WHERE record = ? AND key = ?", (record, key))
        row = found.fetchone()
        if row is None:
            raise DataError(f"{self.path}: the reply {key.hex()} to record {record.hex()} is missing")
        return unpack_alone(row[0])

    def ready(self, stage: str, after: bytes, limit: int) -> list[WorkItem]:
        """Work of a stage in the order of record ids, from beyond ``after``."""
        rows = self._db.execute(
            "SELECT record, attempt FROM work WHERE stage = ? AND state = 0 AND record > ? "
            "ORDER BY record LIMIT ?",
            (stage, after, limit),
        )
        return [WorkItem(*row) for row in rows]

    def states(self) -> list[tuple[str, int, str | None, int]]:
        """(stage, state, class, number) of all work."""
        counters = "SELECT stage, state, nullif(class, ''), number FROM work_count WHERE number"
        scan = "SELECT stage, state, class, count(*) FROM work GROUP BY stage, state, class"
        return self._db.execute(counters if self._is_counted else scan).fetchall()

    def record_counts(self) -> dict[str, int]:
        """Number of records of each stage."""
        scan = "SELECT stage, count(*) FROM record GROUP BY stage"
        return dict(self._db.execute("SELECT * FROM record_count" if self._is_counted else scan).fetchall())

    @property
    def _is_counted(self) -> bool:
        """False until a program that knows the counters has opened the ledger for writing."""
        return self.meta("counted") is not None

    def tallies(self) -> dict[tuple[str, str], float]:
        return {(stage, name): value for stage, name, value in self._db.execute("SELECT * FROM tally")}

    def reply(self, record: bytes, key: bytes) -> StoredReply | None:
        row = self._db.execute("SELECT * FROM call WHERE record = ? AND key = ?", (record, key)).fetchone()
        return None if row is None else _stored_reply(row)

    def replies_of(self, record: bytes, stage: str | None = None) -> list[StoredReply]:
        rows = self._db.execute(
            "SELECT * FROM call WHERE record = ? ORDER BY stage, sample, rowid", (record,)
        )
        return [reply for reply in map(_stored_reply, rows) if stage is None or reply.stage == stage]

    def records_of(self, stage: str, after: bytes = b"") -> Iterator[bytes]:
        """Ids of a stage's records, ascending, from beyond ``after``."""
        query = "SELECT id FROM record WHERE stage = ? AND id > ? ORDER BY id"
        for row in self._db.execute(query, (stage, after)):
            yield row[0]

    def work_of(self, record: bytes) -> list[tuple[str, int, str | None, str | None]]:
        """(stage, state, class, reason) of everything done to a record."""
        return self._db.execute(
            "SELECT stage, state, class, reason FROM work WHERE record = ? ", (record,)
        ).fetchall()

    def inputs(self, stage: str) -> Iterator[tuple[bytes, int, str | None]]:
        """(record, state, class) of a stage's work, in the order of record ids."""
        yield from self._db.execute(
            "SELECT record, state, class FROM work WHERE stage = ? ORDER BY record", (stage,)
        )

    def parent(self, record: bytes) -> tuple[str, bytes | None, int]:
        """(stage, parent, ordinal) of a record."""
        row = self._db.execute("SELECT stage, parent, ordinal FROM record WHERE id = ?", (record,)).fetchone()
        if row is None:
            raise DataError(f"{self.path}: record {record.hex()} is missing")
        return row[0], row[1], row[2]

    def has_record(self, record: bytes) -> bool:
        return self._db.execute("SELECT 1 FROM record WHERE id = ?", (record,)).fetchone() is not None

    def find_ids(self, prefix: str) -> list[bytes]:
        """Records whose hexadecimal id starts with the prefix (at most ten)."""
        digits = 2 * ID_BYTES
        try:
            first, last = (bytes.fromhex(prefix.ljust(digits, fill)) for fill in "0f")
        except ValueError:
            return []
        rows = self._db.execute("SELECT id FROM record WHERE id BETWEEN ? AND ? LIMIT 10", (first, last))
        return [row[0] for row in rows]

    def notes(self) -> list[tuple[bytes, float, JsonObject]]:
        rows = self._db.execute("SELECT record, at, value FROM note ORDER BY record, at, rowid")
        return [(record, at, json.loads(value)) for record, at, value in rows]

    def failures(self, limit: int) -> list[tuple[str, bytes, str, str]]:
        return self._db.execute(
            "SELECT stage, record, class, reason FROM work WHERE state = ? ORDER BY stage, record LIMIT ?",
            (FAILED, limit),
        ).fetchall()


def _stored_reply(row: Sequence[Any]) -> StoredReply:
    record, key, stage, sample, reply, *rest = row
    return StoredReply(record, key, stage, sample, orjson.loads(unpack_alone(reply)), *rest)


def find_record(ledger: Reader, prefix: str) -> bytes:
    """The one record whose id starts with the hexadecimal prefix."""
    found = ledger.find_ids(prefix)
    if not found:
        raise DataError(
            f"no record's id starts with {prefix!r}", hint="the ids are in the exported rows, as `id`"
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
