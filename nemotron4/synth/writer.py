"""The one writer of a ledger, and group commit.

One thread writes whatever has gathered while the last commit reached the disk: an idle run commits at once, a
busy one hundreds of rows at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import queue
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

from nemotron4.synth import tables
from nemotron4.synth.ledger import SCHEMA_VERSION, LedgerError, Reader, connect
from nemotron4.synth.tables import FAILED, Child, Effects, unpack_alone

CACHE_KIB = 65_536
MAX_BATCH = 512


def _sorted_batches(roots: Iterable[Child]) -> Iterator[list[Child]]:
    """Sorted by id, so that neighbours in the ledger's trees are written together."""
    remaining = iter(roots)
    while batch := list(itertools.islice(remaining, 10_000)):
        yield sorted(batch, key=lambda root: root.id)


class Ledger(Reader):
    """The one writer of a ledger file. ``synchronous`` FULL survives power loss, NORMAL survives kill -9."""

    def __init__(self, path: Path, *, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(path.with_suffix(".lock"))
        try:
            self._writer = connect(path, is_read_only=False)
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


class GroupCommit:
    """``await commit.store(effects)`` returns when they are durable. The first failure is final."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._queue: queue.SimpleQueue[tuple[Effects, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="ledger-writer", daemon=True)
        self._error: BaseException | None = None

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._queue.put(None)
        while self._thread.is_alive():
            await asyncio.sleep(0.001)

    def store(self, effects: Effects) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((effects, future))
        return future

    def _run(self) -> None:
        is_open = True
        while is_open:
            batch = [self._queue.get()]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            entries = [entry for entry in batch if entry is not None]
            is_open = len(entries) == len(batch)
            if not entries:
                continue
            try:
                if self._error is not None:
                    raise self._error
                self._ledger.apply([effects for effects, _ in entries])
            except BaseException as error:  # handed to every waiting task, which raises it
                self._error = error
            self._loop.call_soon_threadsafe(_settle, [future for _, future in entries], self._error)


def _settle(futures: list[asyncio.Future[None]], error: BaseException | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
