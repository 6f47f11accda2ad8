"""People review a run: its rows as items of a study, and what their judgments do to an export."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import orjson

from nemotron4.annotation.app import Listed, Shown, ShownAnswer, judgment_rows
from nemotron4.annotation.export import Export, check_form, collect, reward_sample
from nemotron4.annotation.figures import agreements
from nemotron4.annotation.store import AnnotationStore
from nemotron4.annotation.vocabulary import ATTRIBUTE_QUESTIONS, Annotation, Question, Vocabulary
from nemotron4.records import ATTRIBUTES, JsonObject, Message, PreferencePair, RewardSample
from nemotron4.report import Block, Table, Text
from nemotron4.synth.ledger import Reader, ancestry, find_record
from nemotron4.synth.recipe import LEDGER, load_saved_recipe
from nemotron4.synth.rows import (
    Answered,
    ColumnRow,
    Dialogue,
    Document,
    JudgedPair,
    Prompt,
    Response,
    Root,
    Row,
    Topic,
    decode,
)

REVIEWS = "reviews.sqlite"
Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, ...] = ("chosen", "rejected")
VOCABULARY = Vocabulary(
    "review of synthetic data",
    (
        Question("verdict", {"accept": "keep the row", "reject": "leave it out of the export"}),
        Question("preferred", {"chosen": "the judge's choice", "rejected": "the other", "tie": "neither"}),
        Question("comment"),
        *ATTRIBUTE_QUESTIONS,
        Question("edit", of_answer=True, shows_answer=True, title="rewritten answer"),
    ),
    main="verdict",
)


def open_reviews(folder: Path, *, create: bool = True) -> AnnotationStore | None:
    """The reviews of a run, with those that older versions kept in its ledger.

    With ``create`` False nothing is made for a run that nobody reviewed.
    """
    path = folder / REVIEWS
    with Reader(folder / LEDGER) as ledger:
        notes = sorted(ledger.notes(), key=lambda note: note[1])
    if not create and not path.exists() and not notes:
        return None
    store = AnnotationStore(path, VOCABULARY)
    with store.transaction() as db:
        taken = int(store.meta("ledger_notes", "0"))
        for record, at, value in notes[taken:]:
            for judgment in _old_review(record.hex(), at, value):
                store.insert(db, judgment)
        store.set_meta("ledger_notes", str(max(taken, len(notes))))
    return store


def _old_review(record: str, at: float, value: JsonObject) -> Iterator[Annotation]:
    """A note of the ledger was all that a person thought of a row at that time."""
    when = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    whole = {name: value[name] for name in ("verdict", "preferred", "comment") if value.get(name)}
    parts: dict[str, JsonObject] = {"": whole, **{side: {} for side in SIDES}}
    for side, rating in (value.get("ratings") or {}).items():
        parts[side] |= rating
    for side, text in (value.get("edits") or {}).items():
        parts[side]["edit"] = text
    for answer, values in parts.items():
        yield Annotation(item=record, annotator=value["annotator"], answer=answer, values=values, at=when)


class ReviewedRun:
    """The rows of a run as items; each request opens the ledger for itself, also while the run is on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = load_saved_recipe(folder)
        self.title = self.recipe.name
        store = open_reviews(folder)
        assert store is not None
        self.store = store

    def _reader(self) -> Reader:
        return Reader(self.folder / LEDGER)

    def groups(self) -> list[tuple[str, int]]:
        """Stages; the last one that made judged pairs is first: what a reviewer came for."""
        with self._reader() as ledger:
            counts = ledger.record_counts()
        made = [stage for stage in self.recipe.stage if counts.get(stage.name)]
        judged = [stage for stage in made if stage.kind.startswith("judge")]
        first = (judged or made)[-1:]
        ordered = (*first, *(stage for stage in self.recipe.stage if stage not in first))
        return [(stage.name, counts.get(stage.name, 0)) for stage in ordered]

    def listed(self, group: str, after: str, annotator: str) -> Iterator[Listed]:
        stages = [group] if group else [stage.name for stage in self.recipe.stage]
        first, _, last = after.partition("/")
        at = stages.index(first) if first in stages else 0
        with self._reader() as ledger:
            for place, stage in enumerate(stages[at:]):
                start = bytes.fromhex(last) if last and place == 0 else b""
                for record in ledger.records_of(stage, after=start):
                    row = _Row(ledger, record, stage)
                    yield Listed(record.hex(), f"{stage}/{record.hex()}", row.summary, row.text)

    def show(self, item: str, annotator: str) -> tuple[str, Shown]:
        with self._reader() as ledger:
            record = find_record(ledger, item)
            content = ledger.payload(record)
            row = decode(content)
            steps = ancestry(ledger, record)
        turns = _turns(row) or [Message("row", json.dumps(content, indent=1, ensure_ascii=False))]
        shown = Shown(
            title=title(row),
            messages=[turn.to_json() for turn in turns],
            answers=answers(row),
            facts=_facts(row),
            further=[_step(step) for step in steps],
        )
        return record.hex(), shown

    def answer_keys(self, item: str, annotator: str) -> dict[str, str]:
        with self._reader() as ledger:
            row = decode(ledger.payload(bytes.fromhex(item)))
        return {answer.key: answer.key for answer in answers(row)}

    def report(self) -> list[Block]:
        judgments = self.store.judgments()
        verdicts = [each.values["verdict"] for each in judgments if "verdict" in each.values]
        sided = judge_agreement(judgments)
        decided = sided["agree"] + sided["disagree"]
        said = f"{len({each.item for each in judgments})} rows are reviewed: "
        said += f"{verdicts.count('accept')} accepted, {verdicts.count('reject')} rejected."
        rows = [[name, str(number)] for name, number in sided.items()]
        return [
            Text(said, is_verdict=True),
            Text(f"People side with the judge in {sided['agree']} of {decided} preferences."),
            Table(["with the judge", "preferences"], rows),
            *(pair.table() for pair in agreements(judgments, VOCABULARY)),
        ]

    def figures(self) -> JsonObject:
        return {"with_the_judge": judge_agreement(self.store.judgments())}

    def export(self, form: str) -> Export:
        check_form(form)
        judged = self.store.by_item()
        if form == "judgments":
            return Export(judgment_rows(self.store.judgments()), {})
        labels = Labels(judged)
        with self._reader() as ledger:
            rows = labels.preferences(ledger) if form == "preference" else labels.ratings(ledger)
            return collect([[row] for row in rows], "no label")


def create_app(folder: Path) -> Any:
    """The review page of a run's folder; DataError if there is no run."""
    from nemotron4.annotation.app import create_app as create_page

    return create_page(ReviewedRun(folder))


class Labels:
    """The newest judgments of each annotator. A rejection by anyone counts, and the later of two edits."""

    def __init__(self, judged: Mapping[str, Sequence[Annotation]]) -> None:
        self._judged = {bytes.fromhex(item): said for item, said in judged.items()}

    def is_rejected(self, record: bytes) -> bool:
        return any(each.values.get("verdict") == "reject" for each in self._judged.get(record, ()))

    def corrected(self, record: bytes, row: Row) -> Row:
        """The row with the answers that people rewrote."""
        for each in self._judged.get(record, ()):
            if edit := each.values.get("edit"):
                row = _with_answer(row, each.answer, edit)
        return row

    def counts(self, ledger: Reader, stages: Collection[str]) -> dict[str, int]:
        """How many rows of these stages were reviewed, left out and corrected."""
        reviewed = [r for r in self._judged if ledger.has_record(r) and ledger.parent(r)[0] in stages]
        kept = [record for record in reviewed if not self.is_rejected(record)]
        return {
            "reviewed": len(reviewed),
            "left_out": len(reviewed) - len(kept),
            "corrected": sum(any("edit" in each.values for each in self._judged[record]) for record in kept),
        }

    def preferences(self, ledger: Reader) -> Iterator[PreferencePair]:
        """Pairs as people prefer them, one for each person; a tie is no pair."""
        for record, row, said in self._labelled(ledger):
            for each in said:
                preferred = each.values.get("preferred")
                if not isinstance(row, JudgedPair) or preferred not in SIDES:
                    continue
                is_agreed = preferred == "chosen"
                chosen, rejected = (row.chosen, row.rejected) if is_agreed else (row.rejected, row.chosen)
                meta = {"task": row.prompt.task, "annotator": each.annotator, "judge": row.judge}
                yield PreferencePair(
                    id=f"{record.hex()}-{each.annotator}",
                    prompt=row.prompt.messages,
                    chosen=chosen.text,
                    rejected=rejected.text,
                    meta={**meta, "judge_agrees": is_agreed},
                )

    def ratings(self, ledger: Reader) -> Iterator[RewardSample]:
        """Every answer that people rated, with the mean of what they gave."""
        for record, row, said in self._labelled(ledger):
            for side in SIDES:
                messages = _conversation(row, side)
                of_side = [each for each in said if each.answer == side]
                if messages is None or not of_side:
                    continue
                sample = reward_sample(f"{record.hex()}-{side}", messages, of_side, {})
                if sample is not None:
                    yield sample

    def _labelled(self, ledger: Reader) -> Iterator[tuple[bytes, Row, list[Annotation]]]:
        """Judgments with the row they are of, as it was shown; a record that a change removed has none."""
        for record in sorted(self._judged):
            if ledger.has_record(record):
                said = sorted(self._judged[record], key=lambda each: each.annotator)
                yield record, decode(ledger.payload(record)), said


def judge_agreement(judgments: Sequence[Annotation]) -> dict[str, int]:
    """How often people side with the judge; ties are counted apart and are no side."""
    given = [each.values["preferred"] for each in judgments if "preferred" in each.values]
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


# --- how a row is shown


class _Row:
    """A row that is read when somebody asks for it: a list may pass thousands that nobody sees."""

    def __init__(self, ledger: Reader, record: bytes, stage: str) -> None:
        self._ledger, self._record, self._stage = ledger, record, stage

    def _row(self) -> Row:
        return decode(orjson.loads(self._ledger.content(self._record)))

    def summary(self) -> JsonObject:
        row = self._row()
        return {"title": title(row), "group": self._stage, "facts": list(_facts(row).values())}

    def text(self) -> str:
        return searched_text(self._row())


def answers(row: Row) -> list[ShownAnswer]:
    """The answers that a review speaks of, with what their judge gave them."""
    if isinstance(row, Dialogue):
        return [ShownAnswer("chosen", "answer", row.messages[-1].content)]
    if not isinstance(row, JudgedPair):
        return []
    given = ((row.chosen, row.chosen_reward), (row.rejected, row.rejected_reward))
    return [_answer(side, *given[at], row.scores) for at, side in enumerate(SIDES)]


def _answer(side: Side, response: Response, reward: float | None, scores: Mapping[str, Any]) -> ShownAnswer:
    rows, place = scores.get("attributes"), scores.get(side)
    values = rows[place] if isinstance(rows, list) and isinstance(place, int) else ()
    facts = {"judge": "the judge's choice" if side == "chosen" else "rejected by the judge"}
    facts |= {"model": response.model} if response.model else {}
    # A reward has no scale of its own: an LLM judge gives 0 and 1, a reward model any number.
    facts |= {} if reward is None else {"reward": f"{reward:.2f}"}
    return ShownAnswer(side, side, response.text, facts, dict(zip(ATTRIBUTES, values, strict=False)))


def _turns(row: Row) -> tuple[Message, ...]:
    match row:
        case JudgedPair() | Answered():
            return row.prompt.messages
        case Prompt():
            return row.messages
        case Dialogue():
            return row.messages[:-1]
    return ()


def _facts(row: Row) -> dict[str, str]:
    """What a list says of a row: its task, its judge and the gap of its rewards."""
    facts = {"kind": type(row).__name__.lower()}
    if isinstance(row, JudgedPair):
        facts = {"task": row.prompt.task}
        facts |= {"judge": row.judge} if row.judge else {}
        if row.chosen_reward is not None and row.rejected_reward is not None:
            facts["gap"] = f"gap {row.chosen_reward - row.rejected_reward:.2f}"
    elif isinstance(row, Answered):
        facts["task"] = row.prompt.task
    elif isinstance(row, Prompt | Dialogue):
        facts["task"] = row.task
    return facts


def _step(step: JsonObject) -> tuple[str, str]:
    """One ancestor: its row, the raw replies and what was done to it."""
    parts = [json.dumps(step["row"], indent=1, ensure_ascii=False)]
    for call in step["calls"]:
        reply = call["reply"].get("text")
        text = reply if isinstance(reply, str) else json.dumps(call["reply"], indent=1, ensure_ascii=False)
        parts.append(f"reply {call['sample']} to {call['stage']}, {call['tokens'][1] or '?'} tokens:\n{text}")
    for work in step["work"]:
        reason = f" ({work['class']}: {work['reason']})" if work["reason"] else ""
        parts.append(f"{work['stage']}: {work['state']}{reason}")
    return f"{step['stage']} {step['id'][:12]}, {len(step['calls'])} replies", "\n\n".join(parts)


def title(row: Row) -> str:
    """The row's own words in one line."""
    match row:
        case JudgedPair() | Answered():
            text = row.prompt.text
        case Prompt():
            text = row.text
        case Dialogue():
            text = next(message.content for message in row.messages if message.role == "user")
        case Topic():
            text = row.topic
        case Document():
            text = row.text
        case Root():
            text = f"number {row.index}"
        case ColumnRow():
            text = next((value for value in row.columns.values() if isinstance(value, str)), "")
    return " ".join(text.split())[:200]


def searched_text(row: Row) -> str:
    """Everything in a row that a person wrote or read."""
    match row:
        case JudgedPair():
            return "\n".join((searched_text(row.prompt), row.chosen.text, row.rejected.text))
        case Answered():
            return "\n".join((searched_text(row.prompt), *(response.text for response in row.responses)))
        case Prompt() | Dialogue():
            return "\n".join((row.task, row.topic or "", *(message.content for message in row.messages)))
        case Topic():
            return "\n".join((row.topic, row.above or ""))
        case Document():
            return row.text
        case ColumnRow():
            return "\n".join(value for value in row.columns.values() if isinstance(value, str))
        case Root():
            return str(row.entry)
