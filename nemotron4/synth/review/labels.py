"""What people's reviews do to an export: rows left out, answers corrected, labels as rows of their own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nemotron4.records import ATTRIBUTES, JsonObject, Message, PreferencePair, RewardSample
from nemotron4.synth.ledger import Reader
from nemotron4.synth.review.notes import Review, Side
from nemotron4.synth.rows import Dialogue, JudgedPair, Response, Row, decode


class Labels:
    """The newest review of each annotator. A rejection by anyone stands; of two edits the later one does."""

    def __init__(self, reviews: Mapping[bytes, Sequence[Review]]) -> None:
        self._reviews = reviews

    def is_rejected(self, record: bytes) -> bool:
        return any(review.verdict == "reject" for review in self._reviews.get(record, ()))

    def corrected(self, record: bytes, row: Row) -> Row:
        """The row with the answers that people rewrote."""
        for review in self._reviews.get(record, ()):
            for side, text in review.edits.items():
                row = _with_answer(row, side, text)
        return row

    def counts(self, ledger: Reader, stages: Collection[str]) -> dict[str, int]:
        """How many rows of these stages were reviewed, left out and corrected."""
        reviewed = [r for r in self._reviews if ledger.has_record(r) and ledger.parent(r)[0] in stages]
        kept = [record for record in reviewed if not self.is_rejected(record)]
        return {
            "reviewed": len(reviewed),
            "left_out": len(reviewed) - len(kept),
            "corrected": sum(any(review.edits for review in self._reviews[record]) for record in kept),
        }

    def preferences(self, ledger: Reader) -> Iterator[PreferencePair]:
        """Pairs as people prefer them; a tie is no pair."""
        for record, review, row in self._labelled(ledger):
            if not isinstance(row, JudgedPair) or review.preferred not in ("chosen", "rejected"):
                continue
            is_agreed = review.preferred == "chosen"
            chosen, rejected = (row.chosen, row.rejected) if is_agreed else (row.rejected, row.chosen)
            yield PreferencePair(
                id=f"{record.hex()}-{review.annotator}",
                prompt=row.prompt.messages,
                chosen=chosen.text,
                rejected=rejected.text,
                meta={
                    "task": row.prompt.task,
                    "annotator": review.annotator,
                    "judge": row.judge,
                    "judge_agrees": is_agreed,
                },
            )

    def ratings(self, ledger: Reader) -> Iterator[RewardSample]:
        """Every answer that a person rated, with the attributes given."""
        for record, review, row in self._labelled(ledger):
            for side, attributes in review.ratings.items():
                messages = _conversation(row, side)
                if attributes and messages is not None:
                    yield RewardSample(
                        id=f"{record.hex()}-{side}-{review.annotator}",
                        messages=messages,
                        attributes={name: float(value) for name, value in attributes.items()},
                        meta={"annotator": review.annotator},
                    )

    def _labelled(self, ledger: Reader) -> Iterator[tuple[bytes, Review, Row]]:
        """Reviews with the row they are of, as it was shown; a record that a change removed has none."""
        for record in sorted(self._reviews):
            if ledger.has_record(record):
                row = decode(ledger.payload(record))
                for review in sorted(self._reviews[record], key=lambda each: each.annotator):
                    yield record, review, row


def agreement(reviews: Mapping[bytes, Sequence[Review]]) -> JsonObject:
    """How often people side with the judge; ties are counted apart and are no side."""
    given = [review.preferred for each in reviews.values() for review in each if review.preferred]
    return {"agree": given.count("chosen"), "disagree": given.count("rejected"), "tie": given.count("tie")}


def _with_answer(row: Row, side: str, text: str) -> Row:
    if isinstance(row, JudgedPair):
        old: Response = getattr(row, side)
        # The text is a person's now: what was counted and why it ended no longer hold.
        new = replace(old, text=text, tokens=None, finish_reason="edited")
        return replace(row, chosen=new) if side == "chosen" else replace(row, rejected=new)
    if isinstance(row, Dialogue):
        return replace(row, messages=(*row.messages[:-1], Message("assistant", text)))
    return row


def _conversation(row: Row, side: str) -> tuple[Message, ...] | None:
    if isinstance(row, JudgedPair):
        response: Response = getattr(row, side)
        return (*row.prompt.messages, Message("assistant", response.text))
    if isinstance(row, Dialogue) and side == "chosen":
        return row.messages
    return None


def answers(row: Row) -> dict[Side, JsonObject]:
    """The answers that a review speaks of, with what their judge gave them."""
    if isinstance(row, Dialogue):
        return {"chosen": {"text": row.messages[-1].content, "attributes": {}}}
    if not isinstance(row, JudgedPair):
        return {}
    return {
        "chosen": _answer(row.chosen, row.chosen_reward, row.scores, "chosen"),
        "rejected": _answer(row.rejected, row.rejected_reward, row.scores, "rejected"),
    }


def _answer(response: Response, reward: float | None, scores: Mapping[str, Any], side: Side) -> JsonObject:
    rows = scores.get("attributes")
    place = scores.get(side)
    values = rows[place] if isinstance(rows, list) and isinstance(place, int) else ()
    return {
        "text": response.text,
        "model": response.model,
        "finish_reason": response.finish_reason,
        "reward": reward,
        "attributes": dict(zip(ATTRIBUTES, values, strict=False)),
    }
