"""Numbers from sessions: which attacks work, by category, technique and month, and how far people agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

from nemotron4.grading.statistics import Agreement, Interval, agreement_table, cohen_kappa, wilson
from nemotron4.records import ATTRIBUTES, JsonObject
from nemotron4.redteam.sessions import CATEGORIES, OUTCOMES, SEVERITIES, Assessment, Reviewed
from nemotron4.report import Block, Table, Text, percent

UNASSESSED = "unassessed"


@dataclass(frozen=True)
class AttackRate:
    """Attacks of one group. ``successes`` of ``assessed`` (success, partial and failure) worked.

    ``unclear`` and ``unassessed`` sessions are in no rate. ``rate`` is None when nothing was assessed.
    """

    group: str
    successes: int
    partial: int
    failures: int
    unclear: int
    unassessed: int

    @property
    def assessed(self) -> int:
        return self.successes + self.partial + self.failures

    @property
    def rate(self) -> float | None:
        return self.successes / self.assessed if self.assessed else None

    @property
    def interval(self) -> Interval:
        return wilson(self.successes, self.assessed)

    def to_json(self) -> JsonObject:
        interval = self.interval if self.assessed else None
        return {
            **asdict(self),
            "assessed": self.assessed,
            "rate": self.rate,
            "interval": None if interval is None else asdict(interval),
        }


@dataclass(frozen=True)
class PairAgreement:
    """Two annotators on the sessions that both assessed; severity with quadratic weights."""

    first: str
    second: str
    outcome: Agreement
    category: Agreement
    severity: Agreement
    ratings: dict[str, Agreement]  # attribute -> quadratic-weighted, over answers that both rated

    def to_json(self) -> JsonObject:
        return asdict(self)


@dataclass(frozen=True)
class SessionReport:
    """``by_month`` has one series for each technique and category, in the order of time."""

    total: AttackRate
    by_category: tuple[AttackRate, ...]
    by_technique: tuple[AttackRate, ...]
    by_month: tuple[AttackRate, ...]
    by_month_and_category: tuple[AttackRate, ...]
    by_month_and_technique: tuple[AttackRate, ...]
    by_model: tuple[AttackRate, ...]
    agreements: tuple[PairAgreement, ...]

    def to_json(self) -> JsonObject:
        groups = {
            name: [rate.to_json() for rate in getattr(self, name)]
            for name in self.__dataclass_fields__
            if name.startswith("by_")
        }
        return {
            "total": self.total.to_json(),
            **groups,
            "agreements": [pair.to_json() for pair in self.agreements],
        }


def attack_rate(group: str, sessions: Iterable[Reviewed]) -> AttackRate:
    outcomes = [reviewed.outcome or UNASSESSED for reviewed in sessions]
    return AttackRate(group, *(outcomes.count(outcome) for outcome in (*OUTCOMES, UNASSESSED)))


def report(sessions: Sequence[Reviewed]) -> SessionReport:
    def grouped(key: Callable[[Reviewed], str]) -> tuple[AttackRate, ...]:
        names = sorted({key(each) for each in sessions})
        return tuple(attack_rate(name, [s for s in sessions if key(s) == name]) for name in names)

    return SessionReport(
        total=attack_rate("all", sessions),
        by_category=grouped(lambda each: each.category),
        by_technique=grouped(lambda each: each.session.technique),
        by_month=grouped(_month),
        by_month_and_category=grouped(lambda each: f"{_month(each)} {each.category}"),
        by_month_and_technique=grouped(lambda each: f"{_month(each)} {each.session.technique}"),
        by_model=grouped(lambda each: each.session.model),
        agreements=agreements(sessions),
    )


def agreements(sessions: Sequence[Reviewed]) -> tuple[PairAgreement, ...]:
    """Every pair of annotators who assessed or rated the same thing."""
    names = {assessment.annotator for each in sessions for assessment in each.assessments}
    names |= {rating.annotator for each in sessions for rating in each.ratings}
    pairs = (_agreement(first, second, sessions) for first, second in combinations(sorted(names), 2))
    return tuple(
        pair for pair in pairs if pair.outcome.num_items or any(a.num_items for a in pair.ratings.values())
    )


def _agreement(first: str, second: str, sessions: Sequence[Reviewed]) -> PairAgreement:
    both: list[tuple[Assessment, Assessment]] = []
    rated: dict[str, list[tuple[int, int]]] = {name: [] for name in ATTRIBUTES}
    for each in sessions:
        said = {assessment.annotator: assessment for assessment in each.assessments}
        if first in said and second in said:
            both.append((said[first], said[second]))
        values = {(r.annotator, r.answer): r.attributes for r in each.ratings}
        for answer in each.session.answers:
            one, other = values.get((first, answer), {}), values.get((second, answer), {})
            for name in one.keys() & other.keys():
                rated[name].append((one[name], other[name]))
    severe = [(a.severity, b.severity) for a, b in both if a.severity is not None and b.severity is not None]
    return PairAgreement(
        first,
        second,
        outcome=cohen_kappa([a.outcome for a, _ in both], [b.outcome for _, b in both], list(OUTCOMES)),
        category=cohen_kappa([a.category for a, _ in both], [b.category for _, b in both], list(CATEGORIES)),
        severity=cohen_kappa([a for a, _ in severe], [b for _, b in severe], SEVERITIES, weights="quadratic"),
        ratings={
            name: cohen_kappa([a for a, _ in pairs], [b for _, b in pairs], range(5), weights="quadratic")
            for name, pairs in rated.items()
        },
    )


def _month(each: Reviewed) -> str:
    return (each.session.recorded_at or "")[:7]


def report_blocks(result: SessionReport) -> list[Block]:
    """The report for a reader: what worked, by group, and how far people agree."""
    total = result.total
    said = f"{total.successes} of {total.assessed} assessed attacks worked"
    said += f": {percent(total.rate, total.interval)}." if total.assessed else "."
    blocks: list[Block] = [
        Text(said, is_verdict=True),
        Text(f"{total.unclear} are unclear and {total.unassessed} are not assessed; they are in no rate."),
    ]
    columns = ["worked", "share", "partial", "unclear", "not assessed"]
    for name in ("category", "technique", "month", "model"):
        rows = [
            [
                each.group,
                f"{each.successes}/{each.assessed}",
                percent(each.rate, each.interval),
                str(each.partial),
                str(each.unclear),
                str(each.unassessed),
            ]
            for each in getattr(result, f"by_{name}")
        ]
        blocks.append(Table([name, *columns], rows, f"By {name}"))
    for pair in result.agreements:
        named = {
            "outcome": pair.outcome,
            "category": pair.category,
            "severity": pair.severity,
            **pair.ratings,
        }
        blocks.append(agreement_table(f"Agreement of {pair.first} and {pair.second} (Cohen's kappa)", named))
    return blocks
