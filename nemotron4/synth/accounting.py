"""The accounting of a run: what was requested, made, dropped and spent; and what a recipe will cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemotron4.json_form import JsonForm, named
from nemotron4.records import JsonObject
from nemotron4.report import Block, Heading, Table, Text
from nemotron4.synth.graph import PreparedStage
from nemotron4.synth.ledger import Reader
from nemotron4.synth.recipe import SynthRecipe
from nemotron4.synth.rows import Root, decode
from nemotron4.synth.stages.filtering import main_text
from nemotron4.synth.tables import DONE, FAILED, FILTERED, READY
from nemotron4.synth.words import language_of


@dataclass
class StageAccounting:
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
class Accounting:
    stages: tuple[StageAccounting, ...]

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

    def stage(self, name: str) -> StageAccounting:
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


def read_accounting(ledger: Reader, recipe: SynthRecipe) -> Accounting:
    """Two independent counts are compared: records made above a stage, and work booked in it."""
    made = ledger.record_counts()
    by_name: dict[str, StageAccounting] = {}
    for entry in recipe.stage:
        above = entry.takes or (f"root:{entry.name}",)
        requested = sum(made.get(name, 0) for name in above)
        by_name[entry.name] = StageAccounting(
            entry.name, entry.kind, requested, rows_made=made.get(entry.name, 0)
        )
    for name, state, reason, number in ledger.states():
        accounting = by_name.get(name)
        if accounting is None:
            continue
        if state == DONE:
            accounting.done += number
        elif state == READY:
            accounting.pending += number
        elif state == FAILED:
            accounting.failed[reason or "unknown"] = accounting.failed.get(reason or "unknown", 0) + number
        elif state == FILTERED:
            accounting.filtered[reason or "unknown"] = (
                accounting.filtered.get(reason or "unknown", 0) + number
            )
    for (name, counter), value in ledger.tallies().items():
        if name in by_name:
            by_name[name].counters[counter] = value
    return Accounting(tuple(by_name.values()))


def accounting_blocks(accounting: Accounting) -> list[Block]:
    """A table of the stages, with a line for every class of failure and rule of filtering."""
    columns = ("stage", "requested", "done", "failed", "filtered", "pending", "rows", "calls")
    rows = [
        (
            stage.name, stage.requested, stage.done, sum(stage.failed.values()),
            sum(stage.filtered.values()), stage.pending, stage.rows_made,
            int(stage.counters.get("calls", 0)),
        )
        for stage in accounting.stages
    ]  # fmt: skip
    lines = []
    for stage in accounting.stages:
        lines += [f"{stage.name}: {n} failed: {reason}" for reason, n in sorted(stage.failed.items())]
        lines += [f"{stage.name}: {n} filtered: {reason}" for reason, n in sorted(stage.filtered.items())]
        missing = int(stage.counters.get("items_missing", 0))
        if missing:
            requested = int(stage.counters.get("items_requested", 0))
            lines.append(f"{stage.name}: {missing} of {requested} list items did not come")
    spent = f"{int(accounting.total('calls'))} calls, {int(accounting.total('prompt_tokens'))} tokens in, "
    spent += f"{int(accounting.total('completion_tokens'))} out"
    if accounting.total("money"):
        spent += f", {accounting.total('money'):.4f} in money"
    lines.append(f"spent: {spent}")
    lines.append("the accounting balances" if accounting.is_balanced else "THE ACCOUNTING DOES NOT BALANCE")
    return [Table(columns, rows), *map(Text, lines)]


# Tokens per call where nothing was measured (reference figures for a chat model).
_TOKENS = {"judge_llm": (1080, 10), "judge_reward": (490, 0), "respond": (130, 350), "dialogue": (700, 200)}
_LIST_TOKENS = (170, 310)


@dataclass(frozen=True)
class StagePlan:
    name: str
    rows_in: float
    calls: float
    tokens_in: float
    tokens_out: float
    money: float
    seconds: float | None
    rows_out: float


@dataclass(frozen=True)
class CostEstimate:
    """``seconds`` is None where no rate is known: give the folder of an earlier run."""

    stages: tuple[StagePlan, ...]

    @property
    def calls(self) -> float:
        return sum(stage.calls for stage in self.stages)

    @property
    def money(self) -> float:
        return sum(stage.money for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        times = [stage.seconds for stage in self.stages if stage.calls]
        return None if None in times else sum(time for time in times if time is not None)

    def to_json(self) -> JsonObject:
        return {
            "calls": round(self.calls),
            "tokens_in": round(sum(stage.tokens_in for stage in self.stages)),
            "tokens_out": round(sum(stage.tokens_out for stage in self.stages)),
            "money": round(self.money, 4),
            "seconds": self.seconds,
            "stages": [
                {
                    "stage": s.name,
                    "rows_in": round(s.rows_in),
                    "calls": round(s.calls),
                    "rows_out": round(s.rows_out),
                    "seconds": s.seconds,
                }
                for s in self.stages
            ],
        }


def make_plan(
    recipe: SynthRecipe, stages: Sequence[PreparedStage], measured: Accounting | None = None
) -> CostEstimate:
    """Walk the recipe from its sources. ``measured`` gives latency, tokens and yields where it can."""
    known = {stage.name: stage for stage in measured.stages} if measured else {}
    rows: dict[str, float] = {}
    plans = []
    for stage in stages:
        rows_in = _rows_in(stage, rows)
        earlier = known.get(stage.name)
        done = earlier.requested - earlier.pending if earlier else 0
        counters = earlier.counters if earlier and done else {}
        paid = counters.get("calls", 0.0)
        calls_per_row = paid / done if done else _expected(stage, "calls")
        made = earlier.rows_made if earlier else 0
        rows_per_row = made / done if done else _expected(stage, "fan_out")
        calls = rows_in * calls_per_row
        tokens_in, tokens_out = _tokens(stage, counters, paid)
        prices = [recipe.endpoint[name] for name in stage.endpoints]
        price_in = sum(p.price_in for p in prices) / len(prices) if prices else 0.0
        price_out = sum(p.price_out for p in prices) / len(prices) if prices else 0.0
        slots = sum(p.max_in_flight for p in prices)
        latency_s = counters.get("latency_s", 0.0) / paid if paid else None
        parallel = min(slots, max(calls, 1.0))
        seconds = None if latency_s is None or not slots else calls * latency_s / parallel
        rows[stage.name] = rows_in * rows_per_row
        plans.append(
            StagePlan(
                name=stage.name,
                rows_in=rows_in,
                calls=calls,
                tokens_in=calls * tokens_in,
                tokens_out=calls * tokens_out,
                money=calls * (tokens_in * price_in + tokens_out * price_out) / 1e6,
                seconds=seconds if calls else 0.0,
                rows_out=rows[stage.name],
            )
        )
    return CostEstimate(tuple(plans))


def _rows_in(stage: PreparedStage, rows: Mapping[str, float]) -> float:
    if stage.kind.roots is not None:
        return float(sum(1 for _ in stage.kind.roots(stage.knobs)))
    return sum(rows[name] for name in stage.config.takes)


def _expected(stage: PreparedStage, what: str) -> float:
    function = stage.kind.calls if what == "calls" else stage.kind.fan_out
    if function is None:
        return 1.0 if what == "fan_out" else 0.0
    return float(function(stage.knobs))


def _tokens(stage: PreparedStage, counters: Mapping[str, float], paid: float) -> tuple[float, float]:
    if paid:
        return counters.get("prompt_tokens", 0.0) / paid, counters.get("completion_tokens", 0.0) / paid
    tokens_in, tokens_out = _TOKENS.get(stage.config.kind, _LIST_TOKENS)
    limit = tokens_out if stage.sampling is None else stage.sampling.max_tokens
    return tokens_in, min(tokens_out, limit)


def plan_blocks(plan: CostEstimate) -> list[Block]:
    columns = ("stage", "rows in", "calls", "tokens in", "tokens out", "money", "time", "rows out")
    rows = [
        (s.name, f"{s.rows_in:.0f}", f"{s.calls:.0f}", f"{s.tokens_in:.0f}", f"{s.tokens_out:.0f}",
         f"{s.money:.4f}", _time(s.seconds), f"{s.rows_out:.0f}")
        for s in plan.stages
    ]  # fmt: skip
    totals = plan.to_json()
    rows.append(
        ("total", "", str(totals["calls"]), str(totals["tokens_in"]), str(totals["tokens_out"]),
         f"{plan.money:.4f}", _time(plan.seconds), "")
    )  # fmt: skip
    return [Table(columns, rows)]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


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
        (d.stage, d.rule, d.number, ", ".join(f"{name} {n}" for name, n in d.languages.most_common(6)))
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
