"""Sessions in one SQLite file (write-ahead log): what a method returned from is on the disk."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from nemotron4.errors import DataError
from nemotron4.redteam.sessions import Assessment, Correction, Rating, Reviewed, Session

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x6E347274  # "n4rt": an SQLite file of another program is refused

_SCHEMA = """
CREATE TABLE session (
    id TEXT PRIMARY KEY, recorded_at TEXT NOT NULL, annotator TEXT NOT NULL, model TEXT NOT NULL,
    technique TEXT NOT NULL, row TEXT NOT NULL);
CREATE INDEX session_time ON session (recorded_at, id);
CREATE TABLE assessment (
    session TEXT NOT NULL REFERENCES session, annotator TEXT NOT NULL, row TEXT NOT NULL,
    PRIMARY KEY (session, annotator));
CREATE TABLE rating (
    session TEXT NOT NULL REFERENCES session, annotator TEXT NOT NULL, answer INTEGER NOT NULL,
    row TEXT NOT NULL, PRIMARY KEY (session, answer, annotator));
CREATE TABLE correction (
    session TEXT NOT NULL REFERENCES session, annotator TEXT NOT NULL, answer INTEGER NOT NULL,
    row TEXT NOT NULL, PRIMARY KEY (session, answer, annotator));
"""

Row = TypeVar("Row", Assessment, Rating, Correction)


class SessionStore:
    """Read and write sessions. Safe from several threads and several processes at once."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Open the file, or make it; with ``create`` False a missing one is a DataError."""
        self.path = path
        if not create and not path.exists():
            raise DataError(
                f"{path}: there are no sessions here", hint="record one: nemotron4 redteam sessions record"
            )
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"{path}: cannot be opened: {error}") from error
        try:
            self._prepare()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise DataError(f"{path}: not a file of sessions: {error}") from error
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        self._db.execute("PRAGMA busy_timeout = 10000")
        self._db.execute("PRAGMA foreign_keys = ON")
        if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            self._db.execute("PRAGMA journal_mode = WAL")
            with self._transaction() as db:
                # Another process may have been first.
                if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    for statement in _SCHEMA.split(";\n"):
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        found = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found != _APPLICATION_ID or version != SCHEMA_VERSION:
            form = f"form {version}" if found == _APPLICATION_ID else "another program's file"
            raise DataError(f"{self.path}: {form}; expected sessions of form {SCHEMA_VERSION}")
        self._db.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise DataError(f"{self.path}: cannot be written: {error}") from error
                raise

    def record(
        self,
        session: Session,
        *,
        assessments: Sequence[Assessment] = (),
        ratings: Sequence[Rating] = (),
        corrections: Sequence[Correction] = (),
    ) -> Session:
        """Keep a session, and what is said of it already, whole or not at all.

        Returns it with its id and time. An id that exists already is a DataError.
        """
        kept = replace(session, id=session.id or uuid.uuid4().hex, recorded_at=session.recorded_at or _now())
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM session WHERE id = ?", (kept.id,)).fetchone():
                raise DataError(f"{self.path}: session {kept.id} is there already")
            columns = (kept.id, kept.recorded_at, kept.annotator, kept.model, kept.technique)
            db.execute("INSERT INTO session VALUES (?, ?, ?, ?, ?, ?)", (*columns, _text(kept.to_json())))
            for assessment in assessments:
                _put(db, kept, assessment)
            for rating in ratings:
                _put(db, kept, rating)
            for correction in corrections:
                _put(db, kept, correction)
        return kept

    def assess(self, session_id: str, assessment: Assessment) -> Assessment:
        return self._say(session_id, assessment)

    def rate(self, session_id: str, rating: Rating) -> Rating:
        return self._say(session_id, rating)

    def correct(self, session_id: str, correction: Correction) -> Correction:
        return self._say(session_id, correction)

    def _say(self, session_id: str, row: Row) -> Row:
        with self._transaction() as db:
            return _put(db, self._session(db, session_id), row)

    def _session(self, db: sqlite3.Connection, session_id: str) -> Session:
        """The session with this id, or with this unambiguous beginning of one."""
        rows = db.execute(
            "SELECT row FROM session WHERE id = ? OR substr(id, 1, ?) = ? ORDER BY id = ? DESC LIMIT 2",
            (session_id, len(session_id), session_id, session_id),
        ).fetchall()
        found = [Session.from_json(json.loads(text)) for (text,) in rows] if session_id else []
        if not found or (len(found) > 1 and found[0].id != session_id):
            what = "more than one session" if found else "no session"
            raise DataError(
                f"{self.path}: {what} has the id {session_id!r}",
                hint="nemotron4 redteam sessions list shows them",
            )
        return found[0]

    def session(self, session_id: str) -> Reviewed:
        """One session with all that was said of it; the beginning of its id is enough."""
        with self._lock:
            return self._reviewed(self._session(self._db, session_id))

    def sessions(
        self,
        *,
        annotator: str | None = None,
        model: str | None = None,
        technique: str | None = None,
        category: str | None = None,
        outcome: str | None = None,
        newest_first: bool = False,
        limit: int | None = None,
    ) -> list[Reviewed]:
        """Sessions in the order of time. ``category`` and ``outcome`` are the majority's, as in Reviewed."""
        wanted = {"annotator": annotator, "model": model, "technique": technique}
        given = {name: value for name, value in wanted.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in given) or "1"
        order = "DESC" if newest_first else "ASC"
        with self._lock:
            rows = self._db.execute(
                f"SELECT row FROM session WHERE {where} ORDER BY recorded_at {order}, id {order}",
                tuple(given.values()),
            ).fetchall()
            found: list[Reviewed] = []
            for (text,) in rows:
                reviewed = self._reviewed(Session.from_json(json.loads(text)))
                if outcome in (None, reviewed.outcome) and category in (None, reviewed.category):
                    found.append(reviewed)
                if limit is not None and len(found) >= limit:
                    break
        return found

    def _reviewed(self, session: Session) -> Reviewed:
        return Reviewed(
            session,
            self._rows(session, Assessment),
            self._rows(session, Rating),
            self._rows(session, Correction),
        )

    def _rows(self, session: Session, kind: type[Row]) -> tuple[Row, ...]:
        rows = self._db.execute(
            f"SELECT row FROM {kind.__name__} WHERE session = ? ORDER BY annotator, rowid", (session.id,)
        )
        return tuple(kind.from_json(json.loads(text)) for (text,) in rows)


def _put(db: sqlite3.Connection, session: Session, row: Row) -> Row:
    """Keep what an annotator says of a session, in place of what the same one said before."""
    kept = replace(row, at=row.at or _now())
    values: dict[str, Any] = {"session": session.id, "annotator": kept.annotator}
    if isinstance(kept, Rating | Correction):
        if kept.answer not in session.answers:
            places = ", ".join(map(str, session.answers)) or "none"
            raise DataError(
                f"session {session.id} has no answer at place {kept.answer}; its answers are at: {places}"
            )
        values["answer"] = kept.answer
    if isinstance(kept, Correction) and kept.text == session.messages[kept.answer].content:
        raise DataError(f"the correction is the answer at place {kept.answer} itself; expected a better one")
    values["row"] = _text(kept.to_json())
    marks = ", ".join("?" * len(values))
    table = type(kept).__name__
    db.execute(
        f"INSERT OR REPLACE INTO {table} ({', '.join(values)}) VALUES ({marks})", tuple(values.values())
    )
    return kept


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _text(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False)
