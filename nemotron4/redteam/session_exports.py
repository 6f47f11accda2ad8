"""Sessions as rows: preference pairs, reward samples, and whole sessions to and from JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from nemotron4.errors import ConfigError, DataError, unknown_name
from nemotron4.records import (
    ATTRIBUTES,
    FieldError,
    JsonObject,
    Message,
    PreferencePair,
    Record,
    RewardSample,
)
from nemotron4.redteam.session_store import SessionStore
from nemotron4.redteam.sessions import Assessment, Correction, Rating, Reviewed, Session

ExportForm = Literal["sessions", "preference", "reward"]


@dataclass(frozen=True)
class Export:
    """``rows`` in the asked form, and how many sessions gave none, by reason."""

    rows: tuple[Record | JsonObject, ...]
    left_out: dict[str, int]


def export(sessions: Sequence[Reviewed], form: str) -> Export:
    """Rows of ``records.PreferencePair``, of ``records.RewardSample``, or whole sessions."""
    if form not in get_args(ExportForm):
        message, hint = unknown_name("form", form, get_args(ExportForm))
        raise ConfigError(message, hint=hint)
    if form == "sessions":
        return Export(tuple(each.to_json() for each in sessions), {})
    if form == "reward":
        samples = [tuple(_reward_samples(each)) for each in sessions]
        unrated = sum(not each for each in samples)
        rows = tuple(sample for each in samples for sample in each)
        return Export(rows, {"no rating": unrated} if unrated else {})
    return _preferences(sessions)


def _reward_samples(each: Reviewed) -> Iterator[RewardSample]:
    """One row for each rated answer: the mean of its annotators, attribute by attribute."""
    for answer in each.session.answers:
        ratings = [rating for rating in each.ratings if rating.answer == answer]
        if not ratings:
            continue
        attributes: dict[str, float] = {}
        for name in ATTRIBUTES:
            values = [rating.attributes[name] for rating in ratings if name in rating.attributes]
            if values:
                attributes[name] = sum(values) / len(values)
        yield RewardSample(
            messages=each.session.messages[: answer + 1],
            attributes=attributes,
            id=f"{each.session.id}:{answer}",
            meta={"model": each.session.model, "num_annotators": len(ratings)},
        )


def _preferences(sessions: Sequence[Reviewed]) -> Export:
    """Bad answer against a better one: a correction, or an answer to the same turns that resisted.

    The second kind is built only where the assessments are clear: the bad answer ends a session whose attack
    worked, the good one ends a session whose attack failed, after the same messages.
    """
    pairs: list[PreferencePair] = []
    resisted: dict[str, Reviewed] = {}
    for each in sessions:
        if each.outcome == "failure" and each.session.messages[-1].role == "assistant":
            resisted.setdefault(_prompt_key(each.session.messages[:-1]), each)
    left_out = 0
    for each in sessions:
        found = [*_corrections(each)]
        last = len(each.session.messages) - 1
        good = resisted.get(_prompt_key(each.session.messages[:-1]))
        if each.outcome == "success" and each.session.messages[last].role == "assistant" and good is not None:
            found.append(_pair(each, last, good.session.messages[-1].content, f"session {good.session.id}"))
        left_out += not found
        pairs += [replace(pair, id=f"{pair.id}:{number}") for number, pair in enumerate(found)]
    return Export(tuple(pairs), {"no better answer": left_out} if left_out else {})


def _corrections(each: Reviewed) -> Iterator[PreferencePair]:
    for correction in each.corrections:
        yield _pair(each, correction.answer, correction.text, f"correction by {correction.annotator}")


def _pair(each: Reviewed, answer: int, good: str, source: str) -> PreferencePair:
    return PreferencePair(
        prompt=each.session.messages[:answer],
        chosen=good,
        rejected=each.session.messages[answer].content,
        id=f"{each.session.id}:{answer}",
        meta={
            "model": each.session.model,
            "category": each.category,
            "technique": each.session.technique,
            "chosen_source": source,
        },
    )


def _prompt_key(messages: Sequence[Message]) -> str:
    return json.dumps([message.to_json() for message in messages])


def take_row(store: SessionStore, row: JsonObject) -> Session:
    """Keep a session in the form of the export, with its assessments, ratings and corrections.

    All of the row is checked before anything is kept. DataError says what is wrong with it.
    """
    try:
        session = Session.from_json(row)
        assessments = [Assessment.from_json(each) for each in row.get("assessments") or ()]
        ratings = [Rating.from_json(each) for each in row.get("ratings") or ()]
        corrections = [Correction.from_json(each) for each in row.get("corrections") or ()]
    except FieldError as error:
        raise DataError(str(error)) from error
    return store.record(session, assessments=assessments, ratings=ratings, corrections=corrections)
