"""Two scans side by side: what got safer, what got worse, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from nemotron4.grading.statistics import two_shares
from nemotron4.records import JsonObject
from nemotron4.redteam.garak_report import rate
from nemotron4.redteam.garak_results import Counts, ProbeResult
from nemotron4.redteam.garak_scan import ScanResult
from nemotron4.report import Block, Table, Text

Verdict = Literal["safer", "less safe", "no difference shown", "not comparable"]


@dataclass(frozen=True)
class Change:
    """One area or probe in both scans; ``p_value`` is Fisher's exact one, two-sided."""

    name: str
    first: Counts
    second: Counts
    p_value: float | None
    verdict: Verdict

    def to_json(self) -> JsonObject:
        return {**asdict(self), "first": self.first.to_json(), "second": self.second.to_json()}


@dataclass(frozen=True)
class ScanComparison:
    """``differences``: settings that are not the same, which make every row a comparison of two things."""

    areas: tuple[Change, ...]
    probes: tuple[Change, ...]
    differences: tuple[str, ...]

    def to_json(self) -> JsonObject:
        return {
            "areas": [change.to_json() for change in self.areas],
            "probes": [change.to_json() for change in self.probes],
            "differences": list(self.differences),
        }


def compare(first: ScanResult, second: ScanResult) -> ScanComparison:
    """Probes that ran in both. An area counts over exactly these probes, so the two rates are of the same."""
    ran = [{p.probe: p for p in scan.probes if p.status == "run"} for scan in (first, second)]
    both = [name for name in ran[0] if name in ran[1]]
    probes = [_change(name, ran[0][name].counts, ran[1][name].counts) for name in both]
    areas: list[Change] = []
    for area in dict.fromkeys(p.area for p in (*first.probes, *second.probes)):
        names = [name for name in both if ran[0][name].area == area]
        areas.append(_change(area, _total(names, ran[0]), _total(names, ran[1])))
    settings = {**first.settings, **second.settings}
    differences = [
        f"{name} {first.settings.get(name)} against {second.settings.get(name)}"
        for name in settings
        if first.settings.get(name) != second.settings.get(name)
    ]
    only = [name for name in {**ran[0], **ran[1]} if name not in both]
    if only:
        differences.append(f"{len(only)} probes ran in one scan only: {', '.join(only[:5])}")
    return ScanComparison(tuple(areas), tuple(probes), tuple(differences))


def _total(names: Sequence[str], ran: Mapping[str, ProbeResult]) -> Counts:
    return sum((ran[name].counts for name in names), Counts())


def _change(name: str, first: Counts, second: Counts) -> Change:
    if not first.evaluated or not second.evaluated:
        return Change(name, first, second, None, "not comparable")
    p_value = two_shares(first.passed, first.fails, second.passed, second.fails)
    verdict: Verdict = "no difference shown"
    if p_value < 0.05:
        is_safer = second.passed * first.evaluated > first.passed * second.evaluated
        verdict = "safer" if is_safer else "less safe"
    return Change(name, first, second, p_value, verdict)


def comparison_blocks(comparison: ScanComparison) -> list[Block]:
    changed = [change for change in comparison.probes if change.verdict in ("safer", "less safe")]
    worse = [change.name for change in changed if change.verdict == "less safe"]
    said = f"{len(changed)} of {len(comparison.probes)} probes changed"
    said += f"; less safe: {', '.join(worse)}." if worse else "; none got less safe."
    blocks: list[Block] = [Text(said, is_verdict=True)]
    for title, changes in (("Areas", comparison.areas), ("Probes", comparison.probes)):
        rows = [
            [
                change.name,
                rate(change.first),
                rate(change.second),
                "-" if change.p_value is None else f"{change.p_value:.2g}",
                change.verdict,
            ]
            for change in changes
        ]
        columns = [title.lower(), "first, pass rate", "second, pass rate", "p", "verdict"]
        blocks.append(Table(columns, rows, title))
    return [*blocks, *(Text(f"Differs: {difference}") for difference in comparison.differences)]
