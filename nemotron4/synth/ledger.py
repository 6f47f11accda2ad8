"""The ledger of a run: one SQLite file (write-ahead log) that holds records, work, calls and spending.

A *record* is what a stage made of its parent record. *Work* is one stage applied to one record; it is ready,
done, failed (with class and reason) or filtered (with rule). A *call* is a paid reply. One thread writes;
everything a finished piece of work leaves behind goes into one transaction, and many pieces share one commit.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import orjson

from nemotron4.errors import DataError, Nemotron4Error
from nemotron4.records import JsonObject
from nemotron4.synth import tables
from nemotron4.synth.content import unpack, unpack_alone
from nemotron4.synth.effects import FAILED, Child, Effects, StoredReply, WorkItem
from nemotron4.synth.keys import ID_BYTES

SCHEMA_VERSION = 1
CACHE_KIB = 65_536


class LedgerError(Nemotron4Error):
    """The ledger cannot be opened or written: another run holds it, the disk is full, the file is not one."""


def _connect(path: Path, *, is_read_only: bool) -> sqlite3.Connection:
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
        self._db = _connect(path, is_read_only=True)
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

    def count(self, stage: str, state: int) -> int:
        row = self._db.execute("SELECT count(*) FROM work WHERE stage = ? AND state = ?", (stage, state))
        return int(row.fetchone()[0])

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

    def children(self, record: bytes) -> list[tuple[bytes, str]]:
        return self._db.execute(
            "SELECT id, stage FROM record WHERE parent = ? ORDER BY stage, ordinal", (record,)
        ).fetchall()

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


def _sorted_batches(roots: Iterable[Child]) -> Iterator[list[Child]]:
    """Sorted by id, so that neighbours in the ledger's trees are written together."""
    remaining = iter(roots)
    while batch := list(itertools.islice(remaining, 10_000)):
        yield sorted(batch, key=lambda root: root.id)


def _stored_reply(row: Sequence[Any]) -> StoredReply:
    record, key, stage, sample, reply, *rest = row
    return StoredReply(record, key, stage, sample, orjson.loads(unpack_alone(reply)), *rest)


class Ledger(Reader):
    """The one writer of a ledger file. ``synchronous`` FULL survives power loss, NORMAL survives kill -9."""

    def __init__(self, path: Path, *, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(path.with_suffix(".lock"))
        try:
            self._writer = _connect(path, is_read_only=False)
            try:
                self._prepare(synchronous)
                super().__init__(path)
            except BaseException:
                self._writer.close()
                raise
        except sqlite3.DatabaseError as error:
            os.close(self._lock)
            raise LedgerError(f"{path}: cannot be used as a ledger: {error}") from error
        except BaseException:
            os.close(self._lock)
            raise

    def _prepare(self, synchronous: str) -> None:
        self._writer.execute("PRAGMA journal_mode = WAL")
        self._writer.execute(f"PRAGMA synchronous = {synchronous}")
        self._writer.execute("PRAGMA wal_autocheckpoint = 4000")
        # Ids are hashes, so every row goes to another place of the trees; with SQLite's 2 MB of cache each of
        # them is a page read and written again.
        self._writer.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        with self.transaction() as db:
            tables.create(db)
            db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (str(SCHEMA_VERSION),))

    def close(self) -> None:
        super().close()
        self._writer.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All statements inside or none. A full disk or a file error becomes LedgerError."""
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            yield self._writer
            self._writer.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise LedgerError(
                    f"the ledger cannot be written: {error}",
                    hint="nothing is lost: free some space, then repeat the same command",
                ) from error
            raise

    @contextlib.contextmanager
    def attached(self, other: Path) -> Iterator[sqlite3.Connection]:
        """A transaction in which another ledger's tables are visible as ``shard.*``, read-only."""
        self._writer.execute("ATTACH DATABASE ? AS shard", (f"file:{other}?mode=ro",))
        try:
            with self.transaction() as db:
                yield db
        finally:
            self._writer.execute("DETACH DATABASE shard")

    def apply(self, batch: Iterable[Effects]) -> None:
        """Store the effects of many pieces of work in one transaction."""
        with self.transaction() as db:
            tables.apply(db, batch)

    def set_meta(self, name: str, value: str) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def set_roots(self, stage: str, identity: str, roots: Iterable[Child]) -> None:
        """Work of a source stage: one root record each. A changed root is done again, a missing one goes.

        ``identity`` changes with what the roots are made from: while it is the stored one, they are not read.
        They are never all in memory.
        """
        if self.meta(f"roots:{stage}") == identity:
            return
        with self.transaction() as db:
            is_new = db.execute("SELECT 1 FROM record WHERE stage = ?", (f"root:{stage}",)).fetchone() is None
            db.execute("CREATE TEMP TABLE wanted (id BLOB PRIMARY KEY) WITHOUT ROWID")
            for batch in _sorted_batches(roots):
                if not is_new:
                    db.executemany("INSERT INTO wanted VALUES (?)", [(root.id,) for root in batch])
                    batch = [root for root in batch if self._is_missing(db, root)]
                tables.insert_roots(db, stage, batch)
            if not is_new:
                missing = "SELECT id FROM record WHERE stage = ? AND id NOT IN (SELECT id FROM wanted)"
                for (record,) in db.execute(missing, (f"root:{stage}",)).fetchall():
                    tables.delete_record(db, record)
            db.execute("DROP TABLE wanted")
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"roots:{stage}", identity))

    def _is_missing(self, db: sqlite3.Connection, root: Child) -> bool:
        """True if there is no such root; one with another content is removed before."""
        stored = db.execute("SELECT payload FROM record WHERE id = ?", (root.id,)).fetchone()
        if stored is not None and unpack_alone(stored[0]) == root.content:
            return False
        if stored is not None:
            tables.delete_record(db, root.id)
        return True

    def requeue_failed(self, stage: str | None = None) -> int:
        """Make failed work ready again, with a new attempt number so that it draws new samples."""
        with self.transaction() as db:
            where, values = ("", ()) if stage is None else (" AND stage = ?", (stage,))
            return db.execute(
                "UPDATE work SET state = 0, attempt = attempt + 1, class = NULL, reason = NULL "
                f"WHERE state = {FAILED}{where}",
                values,
            ).rowcount

    def fit_graph(self, takes: Mapping[str, Sequence[str]], shape: str) -> None:
        """Give each stage the records of the stages it takes, and remove what belongs to no stage."""
        with self.transaction() as db:
            known = [*takes, *(name for names in takes.values() for name in names)]
            marks = ",".join("?" * len(known))
            for (record,) in db.execute(
                f"SELECT id FROM record WHERE stage NOT IN ({marks})", known
            ).fetchall():
                tables.delete_record(db, record)
            for stage, upstream in takes.items():
                marks = ",".join("?" * len(upstream))
                foreign = db.execute(
                    "SELECT w.record FROM work w LEFT JOIN record r ON r.id = w.record "
                    f"WHERE w.stage = ? AND (r.id IS NULL OR r.stage NOT IN ({marks}))",
                    (stage, *upstream),
                ).fetchall()
                for (record,) in foreign:
                    tables.delete_outputs(db, stage, record)
                    db.execute("DELETE FROM work WHERE stage = ? AND record = ?", (stage, record))
                db.execute(
                    "INSERT OR IGNORE INTO work SELECT ?, id, 0, 0, NULL, NULL, NULL FROM record "
                    f"WHERE stage IN ({marks})",
                    (stage, *upstream),
                )
            marks = ",".join("?" * len(takes))
            db.execute(f"DELETE FROM work WHERE stage NOT IN ({marks})", tuple(takes))
            db.execute("INSERT OR REPLACE INTO meta VALUES ('graph', ?)", (shape,))

    def invalidate(self, stage: str, cfg: bytes) -> int:
        """Redo a stage whose configuration changed: what it made goes, and all that was made of that.

        Paid replies stay: a call that would be repeated unchanged is answered from the ledger.
        """
        with self.transaction() as db:
            stale = db.execute(
                "SELECT record FROM work WHERE stage = ? AND state != 0 AND cfg IS NOT ?", (stage, cfg)
            ).fetchall()
            for (record,) in stale:
                tables.delete_outputs(db, stage, record)
            db.execute(
                "UPDATE work SET state = 0, class = NULL, reason = NULL WHERE stage = ? AND cfg IS NOT ?",
                (stage, cfg),
            )
            return len(stale)

    def drop_idle_counters(self) -> None:
        """Counters of list items belong to work that is done; a stage that starts anew counts anew."""
        with self.transaction() as db:
            db.execute(
                "DELETE FROM tally WHERE name LIKE 'items_%' AND NOT EXISTS "
                "(SELECT 1 FROM work WHERE work.stage = tally.stage AND work.state != 0)"
            )


def _take_lock(path: Path) -> int:
    """Only one process writes a ledger; the lock goes when its process ends, however it ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise LedgerError(
            f"{path.with_suffix('.sqlite')} is in use by another run", hint="wait for it or stop it first"
        ) from error
    return descriptor
