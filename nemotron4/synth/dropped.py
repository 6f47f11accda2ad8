"""What the filters of a run dropped: how many rows by rule and language, with examples."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemotron4.json_form import JsonForm, named
from nemotron4.report import Block, Heading, Table
from nemotron4.synth.ledger import Reader
from nemotron4.synth.rows import Root, decode
from nemotron4.synth.stages.filtering import main_text
from nemotron4.synth.tables import FILTERED
from nemotron4.synth.words import language_of

MAX_SORTED = 200  # rows of one stage whose language is looked at: each takes some milliseconds
SHOWN_CHARACTERS = 160


@dataclass
class Dropped(JsonForm):
    """One rule of one stage. ``languages`` counts the first rows only, ``examples`` are (text, reason)."""

    stage: str
    rule: str
    number: int = field(default=0, metadata=named("rows"))
    languages: Counter[str] = field(default_factory=Counter)
    examples: defaultdict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))


def read_dropped(ledger: Reader, stages: list[str], examples: int = 2) -> list[Dropped]:
    """Every rule that dropped rows, in the order of the stages, the strongest rule first."""
    found: list[Dropped] = []
    for stage in stages:
        rules: dict[str, Dropped] = {}
        for place, (record, rule) in enumerate(_filtered(ledger, stage)):
            dropped = rules.setdefault(rule, Dropped(stage, rule))
            dropped.number += 1
            if place >= MAX_SORTED:
                continue
            text = _text(decode(ledger.payload(record)))
            language = language_of(text)
            dropped.languages[language] += 1
            if len(dropped.examples[language]) < examples:
                reason = next(reason for name, _, _, reason in ledger.work_of(record) if name == stage)
                dropped.examples[language].append((" ".join(text.split())[:SHOWN_CHARACTERS], reason or ""))
        found += sorted(rules.values(), key=lambda dropped: -dropped.number)
    return found


def _filtered(ledger: Reader, stage: str) -> Iterator[tuple[bytes, str]]:
    for record, state, rule in ledger.inputs(stage):
        if state == FILTERED:
            yield record, rule or "unknown"


def _text(row: Any) -> str:
    return str(row.entry.get("text", row.entry)) if isinstance(row, Root) else main_text(row)


def dropped_blocks(found: list[Dropped]) -> list[Block]:
    """A table of rules by language, then the examples."""
    rows = [
        (d.stage, d.rule, str(d.number), ", ".join(f"{name} {n}" for name, n in d.languages.most_common(6)))
        for d in found
    ]
    examples = [
        (d.rule, language, text, reason)
        for d in found
        for language, pairs in sorted(d.examples.items())
        for text, reason in pairs
    ]
    return [
        Heading("Left out, by rule and language"),
        Table(("stage", "rule", "rows", f"languages of the first {MAX_SORTED}"), rows),
        Table(("rule", "language", "text", "reason"), examples),
    ]
