"""What a person said about a record, kept in the ledger beside it.

A review is all that one annotator thinks of a record at a time; the newest one holds, the older ones stay in
the ledger. It may be written while a run is on: a note touches nothing that a run reads or writes.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from nemotron4.errors import DataError
from nemotron4.records import ATTRIBUTES, JsonObject
from nemotron4.synth.ledger import LedgerError, Reader

Verdict = Literal["accept", "reject"]
Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, ...] = ("chosen", "rejected")
SCALE = (0, 1, 2, 3, 4)  # HelpSteer's, for each attribute
MAX_TEXT = 200_000


@dataclass(frozen=True, kw_only=True)
class Review:
    """``preferred``, ``ratings`` and ``edits`` name the answers of a judged pair by the judge's choice.

    A dialogue has one answer, its last turn, under ``chosen``. ``at`` is in seconds since 1970.
    """

    annotator: str
    verdict: Verdict | None = None
    preferred: Side | Literal["tie"] | None = None
    ratings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    edits: Mapping[str, str] = field(default_factory=dict)
    comment: str = ""
    at: float = 0.0

    @classmethod
    def parse(cls, value: object, *, at: float) -> Self:
        """A review as the page sends it; DataError names the field that is wrong."""
        if not isinstance(value, dict):
            raise DataError("a review is an object")
        for name in sorted(
            value.keys() - {"annotator", "verdict", "preferred", "ratings", "edits", "comment"}
        ):
            raise DataError(f"a review has no field {name!r}")
        annotator = _text(value, "annotator").strip()
        if not annotator:
            raise DataError("field 'annotator' is empty; expected a name")
        return cls(
            annotator=annotator,
            verdict=_one_of(value, "verdict", ("accept", "reject")),
            preferred=_one_of(value, "preferred", (*SIDES, "tie")),
            ratings={side: _rating(side, given) for side, given in _by_side(value, "ratings").items()},
            edits={side: _text({side: text}, side) for side, text in _by_side(value, "edits").items()},
            comment=_text(value, "comment"),
            at=at,
        )

    def to_json(self) -> JsonObject:
        return {
            "annotator": self.annotator,
            "verdict": self.verdict,
            "preferred": self.preferred,
            "ratings": {side: dict(rating) for side, rating in self.ratings.items()},
            "edits": dict(self.edits),
            "comment": self.comment,
        }


def _text(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name, "")
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise DataError(f"field {name!r} is not a text of at most {MAX_TEXT:,} characters")
    return text


def _one_of(value: Mapping[str, Any], name: str, known: tuple[str, ...]) -> Any:
    given = value.get(name)
    if given is not None and given not in known:
        raise DataError(f"field {name!r} is {given!r}; expected {', '.join(known)} or null")
    return given


def _by_side(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    given = value.get(name, {})
    if not isinstance(given, dict) or given.keys() - set(SIDES):
        raise DataError(f"field {name!r} is {given!r}; expected an object with {' and '.join(SIDES)}")
    return given


def _rating(side: str, given: object) -> Mapping[str, int]:
    if not isinstance(given, dict) or given.keys() - set(ATTRIBUTES):
        raise DataError(f"ratings.{side} is {given!r}; expected some of {', '.join(ATTRIBUTES)}")
    for name, value in given.items():
        if isinstance(value, bool) or value not in SCALE:
            raise DataError(f"ratings.{side}.{name} is {value!r}; expected 0 to 4")
    return given


def read_reviews(ledger: Reader) -> dict[bytes, list[Review]]:
    """Each annotator's newest review of each record, oldest first."""
    newest: dict[bytes, dict[str, Review]] = {}
    for record, at, value in ledger.notes():
        review = Review.parse(value, at=at)
        reviews = newest.setdefault(record, {})
        reviews.pop(review.annotator, None)  # so that the order is that of the newest
        reviews[review.annotator] = review
    return {record: list(reviews.values()) for record, reviews in newest.items()}


class NoteBook:
    """Adds reviews to a ledger, beside a run that may be writing it. For one thread."""

    def __init__(self, ledger: Path) -> None:
        self._db = sqlite3.connect(f"file:{ledger}?mode=rw", uri=True, isolation_level=None)
        self._db.execute("PRAGMA busy_timeout = 10000")
        self._db.execute("PRAGMA synchronous = FULL")  # what the page says is saved survives a power cut

    def add(self, record: bytes, value: object) -> Review:
        """Check and store a review; it is on the disk when this returns."""
        review = Review.parse(value, at=time.time())
        try:
            self._db.execute(
                "INSERT INTO note VALUES (?, ?, ?)",
                (record, review.at, json.dumps(review.to_json(), ensure_ascii=False)),
            )
        except sqlite3.OperationalError as error:
            raise LedgerError(f"the review was not saved: {error}", hint="try again") from error
        return review

    def close(self) -> None:
        self._db.close()
