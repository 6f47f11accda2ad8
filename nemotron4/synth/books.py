"""The books of a run: what was requested is delivered, failed by class, filtered by rule, or pending."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemotron4.records import JsonObject
from nemotron4.synth.effects import DONE, FAILED, FILTERED, READY
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import Recipe


@dataclass
class StageBooks:
    """One stage. ``requested`` counts the records above it, the other numbers the work done on them."""

    name: str
    kind: str
    requested: int
    done: int = 0
    pending: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    rows_made: int = 0
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def is_balanced(self) -> bool:
        accounted = self.done + self.pending + sum(self.failed.values()) + sum(self.filtered.values())
        return accounted == self.requested

    def to_json(self) -> JsonObject:
        return {
            "stage": self.name,
            "kind": self.kind,
            "requested": self.requested,
            "done": self.done,
            "pending": self.pending,
            "failed": dict(sorted(self.failed.items())),
            "filtered": dict(sorted(self.filtered.items())),
            "rows_made": self.rows_made,
        }


@dataclass(frozen=True)
class Books:
    stages: tuple[StageBooks, ...]

    @property
    def is_balanced(self) -> bool:
        return all(stage.is_balanced for stage in self.stages)

    @property
    def num_pending(self) -> int:
        return sum(stage.pending for stage in self.stages)

    @property
    def num_failed(self) -> int:
        return sum(sum(stage.failed.values()) for stage in self.stages)

    def total(self, counter: str) -> float:
        return sum(stage.counters.get(counter, 0.0) for stage in self.stages)

    def stage(self, name: str) -> StageBooks:
        return next(stage for stage in self.stages if stage.name == name)

    def to_json(self) -> JsonObject:
        """With what was spent; the counters grow over all starts of the run."""
        spending = ("calls", "calls_failed", "prompt_tokens", "completion_tokens", "money", "latency_s")
        return {
            "balanced": self.is_balanced,
            "pending": self.num_pending,
            "failed": self.num_failed,
            "spent": {name: round(self.total(name), 6) for name in spending},
            "stages": [
                {**stage.to_json(), "counters": {k: round(v, 3) for k, v in sorted(stage.counters.items())}}
                for stage in self.stages
            ],
        }


def read_books(ledger: Reader, recipe: Recipe) -> Books:
    """Two independent counts are compared: records made above a stage, and work booked in it."""
    made = ledger.record_counts()
    by_name: dict[str, StageBooks] = {}
    for entry in recipe.stage:
        above = entry.takes or (f"root:{entry.name}",)
        requested = sum(made.get(name, 0) for name in above)
        by_name[entry.name] = StageBooks(entry.name, entry.kind, requested, rows_made=made.get(entry.name, 0))
    for name, state, reason, number in ledger.states():
        books = by_name.get(name)
        if books is None:
            continue
        if state == DONE:
            books.done += number
        elif state == READY:
            books.pending += number
        elif state == FAILED:
            books.failed[reason or "unknown"] = books.failed.get(reason or "unknown", 0) + number
        elif state == FILTERED:
            books.filtered[reason or "unknown"] = books.filtered.get(reason or "unknown", 0) + number
    for (name, counter), value in ledger.tallies().items():
        if name in by_name:
            by_name[name].counters[counter] = value
    return Books(tuple(by_name.values()))


def books_table(books: Books) -> str:
    """The books as aligned text, with a line for every class of failure and rule of filtering."""
    rows: list[Sequence[str]] = [
        ("stage", "requested", "done", "failed", "filtered", "pending", "rows", "calls")
    ]
    for stage in books.stages:
        rows.append(
            (
                stage.name,
                str(stage.requested),
                str(stage.done),
                str(sum(stage.failed.values())),
                str(sum(stage.filtered.values())),
                str(stage.pending),
                str(stage.rows_made),
                str(int(stage.counters.get("calls", 0))),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [aligned(row, widths) for row in rows]
    for stage in books.stages:
        lines += [f"{stage.name}: {n} failed: {reason}" for reason, n in sorted(stage.failed.items())]
        lines += [f"{stage.name}: {n} filtered: {reason}" for reason, n in sorted(stage.filtered.items())]
        missing = int(stage.counters.get("items_missing", 0))
        if missing:
            requested = int(stage.counters.get("items_requested", 0))
            lines.append(f"{stage.name}: {missing} of {requested} list items did not come")
    spent = f"{int(books.total('calls'))} calls, {int(books.total('prompt_tokens'))} tokens in, "
    spent += f"{int(books.total('completion_tokens'))} out"
    if books.total("money"):
        spent += f", {books.total('money'):.4f} in money"
    lines.append(f"spent: {spent}")
    lines.append("the books balance" if books.is_balanced else "THE BOOKS DO NOT BALANCE")
    return "\n".join(lines)


def aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a table: the first column to the left, numbers to the right."""
    first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([row[0].ljust(len(first)), *rest])
