"""A scan as report.md, report.html and a plot: rates, what did not run, attacks that worked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nemotron4.errors import ConfigError
from nemotron4.pages import Block, Folded, Heading, Paragraph, Picture, Table, as_html, as_markdown
from nemotron4.redteam.garak_areas import REPORT_AREAS
from nemotron4.redteam.garak_results import Counts, Hit, ProbeResult, read_hits
from nemotron4.redteam.garak_scan import PROCESSES, ScanResult

HITS_PER_PROBE = 3
MAX_SHOWN = 2000  # characters of one prompt or answer
# How the model card's report words its findings (facts only; it prints no number for any probe).
PUBLISHED = "The technical report of Nemotron-4-340B calls most areas nominal to good and prints one number:"
PUBLISHED_JAILBREAKS = "a pass rate below 30 % on jailbreaks."


def percent(counts: Counts) -> str:
    """``41.2 % [30.1, 53.2]`` or ``unscored``."""
    rate, interval = counts.pass_rate, counts.interval
    if rate is None or interval is None:
        return "unscored"
    return f"{100 * rate:.1f} % [{100 * interval.lower:.1f}, {100 * interval.upper:.1f}]"


def area_state(probes: Sequence[ProbeResult]) -> str:
    """What may be said of an area: never "passed" where something did not run."""
    num_run = sum(probe.status == "run" for probe in probes)
    if not num_run:
        return "not run"
    return "run" if num_run == len(probes) else f"in part: {num_run} of {len(probes)} probes"


def scan_lines(result: ScanResult) -> list[str]:
    """The areas for a reader at a terminal."""
    lines = [f"{'area':<26}{'pass rate, 95 % interval':<30}{'passed':>12}{'none':>7}  state"]
    for area, counts in result.areas().items():
        state = area_state([probe for probe in result.probes if probe.area == area])
        shown = percent(counts) if counts.evaluated else "-"
        passed = f"{counts.passed}/{counts.evaluated}" if counts.evaluated else "-"
        lines.append(f"{area:<26}{shown:<30}{passed:>12}{counts.nones:>7}  {state}")
    return lines


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


def report_blocks(
    result: ScanResult, hits: Mapping[str, Sequence[Hit]], pictures: Sequence[Picture]
) -> list[Block]:
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
    by_area = {area: [p for p in result.probes if p.area == area] for area in result.areas()}
    areas = [
        [area, percent(counts) if counts.evaluated else "-", *_numbers(counts), area_state(by_area[area])]
        for area, counts in result.areas().items()
    ]
    missing = [area for area in REPORT_AREAS if area not in by_area]
    areas += [[area, "-", "-", "-", "-", "not asked for"] for area in missing]
    probes = [
        [p.area, p.probe, p.primary or "-", percent(p.counts), *_numbers(p.counts)]
        for p in result.probes
        if p.status == "run"
    ]
    others = [
        [p.probe, detector, percent(counts), *_numbers(counts)]
        for p in result.probes
        for detector, counts in p.detectors.items()
        if detector != p.primary
    ]
    left_out = [[p.area, p.probe, p.status, p.reason or ""] for p in result.probes if p.status != "run"]
    columns = ["pass rate, 95 % interval", "passed", "attacks that worked", "no verdict"]
    blocks: list[Block] = [
        Heading(f"garak scan of {result.model}", 1),
        Paragraph(
            "A pass is an answer that the probe's primary detector found harmless; higher is safer. "
            "Intervals are Wilson's over answers; answers to one prompt are not independent, so the true "
            "ones are wider. Answers without a verdict, and probes that did not run, are in no rate."
        ),
        Paragraph(f"Settings: {settings}."),
        Paragraph(f"{PUBLISHED} {PUBLISHED_JAILBREAKS} Its probes and settings are not known."),
        Heading("By area"),
        Table(["area", *columns, "state"], areas),
        *pictures,
        Heading("By probe"),
        Table(["area", "probe", "primary detector", *columns], probes),
    ]
    if others:
        blocks += [Heading("Further detectors"), Table(["probe", "detector", *columns], others)]
    blocks.append(Heading("What did not run"))
    blocks.append(
        Table(["area", "probe", "state", "reason"], left_out) if left_out else Paragraph("Every probe ran.")
    )
    if hits:
        blocks += [
            Heading("Attacks that worked"),
            Paragraph(
                "Content warning: what follows are attacks and what the model answered, word for word. It "
                "may be offensive or harmful. Each is folded; open one only if you need to see it."
            ),
            *(_hit_block(probe, found) for probe, found in hits.items()),
        ]
    return blocks


def _numbers(counts: Counts) -> list[str]:
    if not counts.evaluated and not counts.nones:
        return ["-", "-", "-"]
    return [f"{counts.passed}/{counts.evaluated}", str(counts.fails), str(counts.nones)]


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
    try:
        from nemotron4.redteam.plots import draw_areas
    except ImportError as error:
        raise ConfigError(
            f"plots need matplotlib, which is not installed ({error})", hint="pip install 'nemotron4[plot]'"
        ) from error
    picture = draw_areas({result.model: result.areas()}, folder / "areas.png")
    blocks = report_blocks(
        result, worst_hits(result, folder), [Picture(picture.name, "Pass rates by area, 95 % intervals")]
    )
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text(as_markdown(blocks), encoding="utf-8")
    page.write_text(as_html(blocks, f"garak scan of {result.model}"), encoding="utf-8")
    return [markdown, page, picture]
