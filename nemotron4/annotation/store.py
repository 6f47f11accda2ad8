"""Judgments in one SQLite file (write-ahead log): what a method returned from is on the disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from nemotron4.annotation.vocabulary import Annotation, Vocabulary, check_annotator
from nemotron4.errors import DataError
from nemotron4.records import JsonObject, is_unicode

_APPLICATION_ID = 0x6E34616E  # "n4an": an SQLite file of another program is refused
_FORM = 1
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE item (id TEXT PRIMARY KEY, at TEXT NOT NULL, row TEXT NOT NULL);
CREATE INDEX item_time ON item (at, id);
CREATE TABLE draft (id TEXT PRIMARY KEY, at TEXT NOT NULL, row TEXT NOT NULL);
CREATE TABLE judgment (
    id INTEGER PRIMARY KEY, item TEXT NOT NULL, answer TEXT NOT NULL, annotator TEXT NOT NULL,
    at TEXT NOT NULL, row TEXT NOT NULL);
CREATE INDEX judgment_item ON judgment (item, annotator, answer, id);
"""
_NEWEST = (
    "SELECT item, answer, annotator, at, row FROM judgment WHERE {where} AND id IN "
    "(SELECT max(id) FROM judgment GROUP BY item, annotator, answer) ORDER BY id"
)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One opener at a time: SQLite does not wait for another one where a new file gets its log."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class AnnotationStore:
    """The judgments of one study, and its items where they have no other home.

    Safe from several threads and several processes at once. The newest judgment of an annotator holds; older
    ones stay in the file. ``upgrade`` turns a file of an older program into one of this form, by its
    application id.
    """

    def __init__(
        self,
        path: Path,
        vocabulary: Vocabulary,
        *,
        create: bool = True,
        upgrade: Mapping[int, Callable[[sqlite3.Connection, AnnotationStore], None]] | None = None,
    ) -> None:
        """Open the file, or make it; with ``create`` False a missing one is a DataError."""
        self.path = path
        self.vocabulary = vocabulary
        self._upgrade = upgrade or {}
        if not create and not path.exists():
            raise DataError(f"{path}: there are no judgments here")
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"{path}: cannot be opened: {error}") from error
        try:
            with _alone(path.parent):
                self._prepare()
        except sqlite3.OperationalError as error:
            self._db.close()
            raise DataError(f"{path}: cannot be opened: {error}", hint="try again") from error
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise DataError(f"{path}: not a file of judgments: {error}") from error
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        self._db.execute("PRAGMA busy_timeout = 10000")
        if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        found = self._db.execute("PRAGMA application_id").fetchone()[0]
        is_empty = not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if is_empty or found in self._upgrade:
            with self.transaction() as db:
                # Another process may have been first.
                found = db.execute("PRAGMA application_id").fetchone()[0]
                if found in self._upgrade:
                    self._upgrade[found](db, self)
                elif not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    self.create_tables(db)
        found = self._db.execute("PRAGMA application_id").fetchone()[0]
        form = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found != _APPLICATION_ID or form != _FORM:
            what = f"form {form}" if found == _APPLICATION_ID else "another program's file"
            raise DataError(f"{self.path}: {what}; expected judgments of form {_FORM}")
        kind = self.meta("kind", self.vocabulary.kind)
        if kind != self.vocabulary.kind:
            raise DataError(
                f"{self.path}: holds a study of the kind {kind!r}; expected {self.vocabulary.kind!r}"
            )

    def create_tables(self, db: sqlite3.Connection) -> None:
        for statement in _SCHEMA.split(";\n"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {_FORM}")

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._db.in_transaction:  # part of the one that is open
                yield self._db
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise DataError(f"{self.path}: cannot be written: {error}", hint="try again") from error
                raise

    def _read(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock:
            return self._db.execute(statement, tuple(values)).fetchall()

    def meta(self, name: str, default: str) -> str:
        """A value of the file; the default is kept where there is none yet."""
        found = self._read("SELECT value FROM meta WHERE name = ?", (name,))
        if not found:
            with self.transaction() as db:
                db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, default))
            found = self._read("SELECT value FROM meta WHERE name = ?", (name,))
        return str(found[0][0])

    def set_meta(self, name: str, value: str) -> None:
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def take(self, other: AnnotationStore, name: str) -> None:
        """Copy another file's judgments, once; ``name`` says which it is."""
        with self.transaction() as db:
            if self.meta(f"taken:{name}", "no") == "no":
                columns = "item, answer, annotator, at, row"
                rows = other._read(f"SELECT {columns} FROM judgment ORDER BY id")
                db.executemany(f"INSERT INTO judgment ({columns}) VALUES (?, ?, ?, ?, ?)", rows)
                self.set_meta(f"taken:{name}", "yes")

    def token(self) -> str:
        """The secret part of the page's address: who cannot read the file cannot know it."""
        return self.meta("token", secrets.token_urlsafe(24))

    # --- items and drafts

    def add_item(self, item: str, at: str, row: JsonObject) -> None:
        """Keep an item; an id that exists already is a DataError."""
        with self.transaction() as db:
            if db.execute("SELECT 1 FROM item WHERE id = ?", (item,)).fetchone():
                raise DataError(f"{self.path}: {item} is there already")
            db.execute("INSERT INTO item VALUES (?, ?, ?)", (item, at, _text(row)))

    def items(self, *, prefix: str = "") -> list[JsonObject]:
        """Items in the order of time, or those whose id begins with ``prefix``."""
        rows = self._read(
            "SELECT row FROM item WHERE substr(id, 1, ?) = ? ORDER BY at, id", (len(prefix), prefix)
        )
        return [json.loads(text) for (text,) in rows]

    def put_draft(self, draft: str, row: JsonObject | None) -> None:
        """Keep something unfinished under its id; None drops it."""
        with self.transaction() as db:
            if row is None:
                db.execute("DELETE FROM draft WHERE id = ?", (draft,))
            else:
                db.execute("INSERT OR REPLACE INTO draft VALUES (?, ?, ?)", (draft, now(), _text(row)))

    def drafts(self) -> dict[str, JsonObject]:
        return {
            name: json.loads(text) for name, text in self._read("SELECT id, row FROM draft ORDER BY at, id")
        }

    # --- judgments

    def say(
        self, item: str, annotator: object, values: Mapping[str, Any], *, answer: str = "", at: str = ""
    ) -> Annotation:
        """Add to what an annotator says of an item or of one answer; a value of None takes one back."""
        name = check_annotator(annotator)
        self.vocabulary.check(values, of_answer=bool(answer))
        with self.transaction() as db:
            row = db.execute(
                "SELECT row FROM judgment WHERE item = ? AND annotator = ? AND answer = ? "
                "ORDER BY id DESC LIMIT 1",
                (item, name, answer),
            ).fetchone()
            merged = {**(json.loads(row[0]) if row else {}), **values}
            kept = Annotation(
                item=item,
                annotator=name,
                answer=answer,
                values={key: value for key, value in merged.items() if value not in (None, "")},
                at=at or now(),
            )
            self.insert(db, kept)
        return kept

    def insert(self, db: sqlite3.Connection, kept: Annotation) -> None:
        db.execute(
            "INSERT INTO judgment (item, answer, annotator, at, row) VALUES (?, ?, ?, ?, ?)",
            (kept.item, kept.answer, kept.annotator, kept.at, _text(dict(kept.values))),
        )

    def judgments(self, item: str | None = None) -> list[Annotation]:
        """The newest judgment of each annotator of each thing, the oldest first; empty ones are left out."""
        where, values = ("1", ()) if item is None else ("item = ?", (item,))
        return [
            Annotation(item=name, answer=answer, annotator=annotator, at=at, values=json.loads(text))
            for name, answer, annotator, at, text in self._read(_NEWEST.format(where=where), values)
            if text != "{}"
        ]

    def by_item(self) -> dict[str, list[Annotation]]:
        found: dict[str, list[Annotation]] = {}
        for judgment in self.judgments():
            found.setdefault(judgment.item, []).append(judgment)
        return found

    def last_change(self) -> int:
        """A number that grows with each judgment: pages ask it to see whether somebody else wrote."""
        return int(self._read("SELECT coalesce(max(id), 0) FROM judgment")[0][0])


def _text(row: JsonObject) -> str:
    if not is_unicode(row):
        raise DataError("a text has half of a character pair (a lone surrogate)")
    return json.dumps(row, ensure_ascii=False)
