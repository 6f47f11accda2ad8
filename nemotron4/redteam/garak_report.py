"""A scan as report.md, report.html and a plot, and two scans next to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemotron4.grading.statistics import two_shares
from nemotron4.json_form import JsonForm
from nemotron4.plots import draw_bars
from nemotron4.redteam.garak_areas import REPORT_AREAS
from nemotron4.redteam.garak_scan import PROCESSES, Counts, Hit, ProbeResult, ScanResult, read_hits
from nemotron4.report import Bar, Bars, Block, Folded, Heading, Table, Text, percent
from nemotron4.report import write_report as write_files

PICTURE = "areas.png"
COLUMNS = ["pass rate, 95 % interval", "passed", "attacks that worked", "no verdict"]
EMPTY = "empty answers"

HITS_PER_PROBE = 3
MAX_SHOWN = 2000  # characters of one prompt or answer
# How the model card's report words its findings (facts only; it prints no number for any probe).
PUBLISHED = "The technical report of Nemotron-4-340B calls most areas nominal to good and prints one number:"
PUBLISHED_JAILBREAKS = "a pass rate below 30 % on jailbreaks."


def rate(counts: Counts) -> str:
    return percent(counts.pass_rate, counts.interval)


def area_name(area: str) -> str:
    return area.replace("_", " ")


def area_state(probes: Sequence[ProbeResult]) -> str:
    """What may be said of an area: never "passed" where something did not run."""
    num_run = sum(probe.status == "run" for probe in probes)
    if not num_run:
        return "not run"
    return "run" if num_run == len(probes) else f"in part: {num_run} of {len(probes)} probes"


def num_empty(probes: Sequence[ProbeResult]) -> int | None:
    """Empty answers to the probes that ran; None where the result does not say."""
    known = [probe.num_empty for probe in probes if probe.num_empty is not None]
    return sum(known) if known else None


def finding(result: ScanResult) -> str:
    """The whole in short: how many attacks worked, where most, and how many answers were empty."""
    areas = {area: counts for area, counts in result.areas.items() if counts.evaluated}
    total = sum(areas.values(), Counts())
    if not areas:
        return "no probe ran, so nothing can be said."
    empty = num_empty(result.probes)
    silence = f" {empty} of the answers were empty." if empty else ""
    if not total.fails:
        return f"none of {total.evaluated} attacks worked.{silence}"
    worst = min(areas, key=lambda area: areas[area].pass_rate or 0.0)
    return (
        f"{total.fails} of {total.evaluated} attacks worked. The weakest area is "
        f"{area_name(worst)}: {rate(areas[worst])} passed.{silence}"
    )


def verdict(result: ScanResult) -> str:
    return f"{result.model}: {finding(result)}"


def summary_blocks(result: ScanResult) -> list[Block]:
    """What a reader at a terminal sees; the report begins with it."""
    rows = []
    for area, counts in result.areas.items():
        probes = [probe for probe in result.probes if probe.area == area]
        share = rate(counts) if counts.evaluated else "-"
        cells = [*_numbers(counts), _count(num_empty(probes)), area_state(probes)]
        rows.append([area_name(area), share, *cells])
    return [Text(verdict(result), is_verdict=True), Table(["area", *COLUMNS, EMPTY, "state"], rows)]


def area_bars(models: Mapping[str, Mapping[str, Counts]]) -> Bars:
    """Pass rates by area, one bar for each model; an area without a rate says so."""
    names = list(models)
    bars = []
    for area in dict.fromkeys(area for counts in models.values() for area in counts):
        for model in names:
            counts = models[model].get(area, Counts())
            share, span = counts.pass_rate, counts.interval
            if share is None or span is None:
                bars.append(Bar(area_name(area), None, label="not run", series=model))
                continue
            label = f"{100 * share:.1f} % ({counts.passed}/{counts.evaluated})"
            bars.append(Bar(area_name(area), 100 * share, 100 * span.lower, 100 * span.upper, label, model))
    title = f"Attacks that {names[0]} withstood" if len(names) == 1 else "Attacks withstood"
    return Bars(title, "% of the answers that passed (higher is safer)", bars, limit=100, picture=PICTURE)


def worst_hits(result: ScanResult, folder: Path) -> dict[str, list[Hit]]:
    """By probe, the attacks that worked with the highest score; equal answers once."""
    detectors = {probe.probe: probe.primary for probe in result.probes if probe.status == "run"}
    found: dict[str, dict[str, Hit]] = {}
    for path in sorted((folder / PROCESSES).glob("*.report.jsonl")):
        for hit in read_hits(path, detectors):
            known = found.setdefault(hit.probe, {})
            if hit.output not in known or known[hit.output].score < hit.score:
                known[hit.output] = hit
    return {
        probe: sorted(hits.values(), key=lambda hit: -hit.score)[:HITS_PER_PROBE]
        for probe, hits in sorted(found.items())
    }


def report_blocks(result: ScanResult, hits: Mapping[str, Sequence[Hit]]) -> list[Block]:
    words = {True: "yes", False: "no"}
    settings = ", ".join(
        f"{name.removeprefix('is_').replace('_', ' ')} {words[value] if isinstance(value, bool) else value}"
        for name, value in result.settings.items()
    )
    asked = {probe.area for probe in result.probes}
    missing = [area_name(area) for area in REPORT_AREAS if area not in asked]
    others = [
        [p.probe, detector, rate(counts), *_numbers(counts)]
        for p in result.probes
        for detector, counts in p.detectors.items()
        if detector != p.primary
    ]
    left_out = [
        [area_name(p.area), p.probe, p.status, p.reason or ""] for p in result.probes if p.status != "run"
    ]
    blocks: list[Block] = [Heading(f"garak scan of {result.model}", 1), *summary_blocks(result)]
    if missing:
        blocks.append(Text(f"Not asked for: {', '.join(missing)}."))
    blocks += [
        area_bars({result.model: result.areas}),
        Text(
            "A pass is an answer that the probe's primary detector found harmless; higher is safer. "
            "Intervals are Wilson's over answers; answers to one prompt are not independent, so the true "
            "ones are wider. Answers without a verdict, and probes that did not run, are in no rate. Empty "
            "answers are judged as any other: most detectors find nothing in them, which is no refusal."
        ),
        Text(f"Settings: {settings}."),
        Text(f"{PUBLISHED} {PUBLISHED_JAILBREAKS} Its probes and settings are not known."),
        Heading("By probe"),
        Table(["area", "probe", "primary detector", *COLUMNS, EMPTY], _probe_rows(result)),
    ]
    if others:
        blocks += [Heading("Further detectors"), Table(["probe", "detector", *COLUMNS], others)]
    blocks.append(Heading("What did not run"))
    blocks.append(
        Table(["area", "probe", "state", "reason"], left_out) if left_out else Text("Every probe ran.")
    )
    if hits:
        blocks += [
            Heading("Attacks that worked"),
            Text(
                "Content warning: what follows are attacks and what the model answered, word for word. It "
                "may be offensive or harmful. Each is folded; open one only if you need to see it."
            ),
            *(_hit_block(probe, found) for probe, found in hits.items()),
        ]
    return blocks


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)


def _numbers(counts: Counts) -> list[str]:
    if not counts.evaluated and not counts.nones:
        return ["-", "-", "-"]
    return [f"{counts.passed}/{counts.evaluated}", str(counts.fails), str(counts.nones)]


def _probe_rows(result: ScanResult) -> list[list[str]]:
    rows = []
    for probe in result.probes:
        if probe.status == "run":
            cells = [*_numbers(probe.counts), _count(probe.num_empty)]
            rows.append(
                [area_name(probe.area), probe.probe, probe.primary or "-", rate(probe.counts), *cells]
            )
    return rows


def _hit_block(probe: str, hits: Sequence[Hit]) -> Folded:
    texts: list[tuple[str, str]] = []
    for hit in hits:
        texts.append((f"prompt ({hit.detector}, score {hit.score:g})", _cut(hit.prompt)))
        texts.append(("answer", _cut(hit.output)))
    return Folded(f"{probe}: {len(hits)} of the attacks that worked", texts)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} [... {len(text) - MAX_SHOWN} more]"


def write_report(result: ScanResult, folder: Path) -> list[Path]:
    """``report.md``, ``report.html`` and ``areas.png`` in the scan's folder."""
    picture = draw_bars(area_bars({result.model: result.areas}), folder / PICTURE)
    blocks = report_blocks(result, worst_hits(result, folder))
    return [*write_files(folder, f"garak scan of {result.model}", blocks), picture]


# --- two scans: what got safer, what got worse, and what cannot be compared

ChangeVerdict = Literal["safer", "less safe", "no difference shown", "not comparable"]


@dataclass(frozen=True)
class Change(JsonForm):
    """One area or probe in both scans; ``p_value`` is Fisher's exact one, two-sided."""

    name: str
    first: Counts
    second: Counts
    p_value: float | None
    verdict: ChangeVerdict


@dataclass(frozen=True)
class ScanComparison(JsonForm):
    """``differences``: settings that are not the same, which make every row a comparison of two things."""

    areas: tuple[Change, ...]
    probes: tuple[Change, ...]
    differences: tuple[str, ...]


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
    verdict: ChangeVerdict = "no difference shown"
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
