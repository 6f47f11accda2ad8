"""A scan: one garak process for each module, resumed where it was stopped, a crash costing one probe only."""

from __future__ import annotations

import json
import socket
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

from nemotron4.errors import DataError, Nemotron4Error
from nemotron4.json_form import JsonForm, to_json
from nemotron4.redteam.garak_areas import ScanPlan, Unit
from nemotron4.redteam.garak_process import (
    GARAK_VERSION,
    Target,
    configuration,
    garak_environment,
    run_garak,
)
from nemotron4.redteam.garak_results import Counts, ProbeResult, read_report
from nemotron4.redteam.settings import ScanSettings
from nemotron4.runs import RowLog, claim, held, write_json

RESULT_FILE = "result.json"
PROCESSES = "processes"
FAILURES_FILE = "failures.jsonl"
Note = Callable[[str], None]


@dataclass(frozen=True)
class ScanResult(JsonForm):
    """All probes of a scan: run, failed and skipped. Nothing that did not run counts as passed."""

    target: str
    model: str
    settings: Mapping[str, Any]
    probes: tuple[ProbeResult, ...]
    garak: ClassVar = GARAK_VERSION
    also_written: ClassVar = {"garak": "garak", "areas": "areas"}

    @property
    def areas(self) -> dict[str, Counts]:
        """By area, over the primary detectors of the probes that ran; empty counts mean "not run"."""
        found: dict[str, Counts] = {}
        for probe in self.probes:
            found[probe.area] = found.get(probe.area, Counts()) + probe.counts
        return found


def load_scan(folder: Path) -> ScanResult:
    path = folder / RESULT_FILE
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        return ScanResult.from_json(row)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}",
            hint="a scan that was stopped has no result: run it again",
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a result of this version: {error!r}") from error


def scan(
    plan: ScanPlan, target: Target, settings: ScanSettings, *, out: Path, python: Path, note: Note
) -> ScanResult:
    """Run what is not there yet; a probe that failed before is tried again.

    Raises Nemotron4Error when the target stops answering: the same command then goes on.
    """
    with held(out):
        return _scan(plan, target, settings, out, python, note)


def _scan(
    plan: ScanPlan, target: Target, settings: ScanSettings, out: Path, python: Path, note: Note
) -> ScanResult:
    identity = {
        "kind": "garak",
        "garak": GARAK_VERSION,
        "model": target.model,
        "probes": sorted(plan.detectors),
        "form": "generate" if target.is_generate else "openai",
        **to_json(settings),
    }
    claim(out, identity)
    processes = out / PROCESSES
    processes.mkdir(exist_ok=True)
    failures: dict[str, str] = {}
    with RowLog(out / FAILURES_FILE, key=itemgetter("probe")) as log:
        for number, unit in enumerate(plan.units, start=1):
            _require_answer(target)
            done = finished_probes(processes, unit)
            label = f"[{number}/{len(plan.units)}] {unit.area}: {unit.module}"
            left = [probe for probe in unit.probes if probe not in done]
            if not left:
                note(f"{label}: there already")
                continue
            note(f"{label}, {len(left)} probe{'s' if len(left) > 1 else ''}")
            failed = _run_unit(unit, left, _Run(target, settings, processes, out, python, note))
            for probe, reason in failed.items():
                log.append({"probe": probe, "reason": reason})
                note(f"  {probe} failed: {reason}")
            failures |= failed
    result = ScanResult(target.url, target.model, to_json(settings), _collect(plan, processes, failures))
    write_json(out / RESULT_FILE, result.to_json())
    return result


@dataclass(frozen=True)
class _Run:
    target: Target
    settings: ScanSettings
    processes: Path
    out: Path
    python: Path
    note: Note

    def start(self, unit: Unit, probes: tuple[str, ...]) -> str | None:
        name = f"{unit.name}-{len(list(self.processes.glob(f'{unit.name}-*.config.json'))) + 1}"
        reason = run_garak(
            self.python,
            configuration(self.target, self.settings, self.processes, name),
            probes,
            folder=self.processes,
            name=name,
            environment=garak_environment(self.out, self.settings, self.target.api_key),
            note=self.note,
        )
        _require_answer(self.target)  # what fails without its target is no fault of the probe
        return reason


def _run_unit(unit: Unit, probes: list[str], run: _Run) -> dict[str, str]:
    """Probes that failed, with the reason. Together first; after a failure each of the rest alone."""
    reason = run.start(unit, tuple(probes))
    left = [probe for probe in probes if probe not in finished_probes(run.processes, unit)]
    if not left:
        return {}
    if len(probes) == 1:
        return {left[0]: reason or "garak gave no result for it"}
    failed: dict[str, str] = {}
    for probe in left:
        run.note(f"  {probe} alone, because the module's process did not finish it")
        reason = run.start(unit, (probe,))
        if probe not in finished_probes(run.processes, unit):
            failed[probe] = reason or "garak gave no result for it"
    return failed


def report_files(processes: Path, unit: Unit) -> list[Path]:
    return sorted(processes.glob(f"{unit.name}-*.report.jsonl"))


def finished_probes(processes: Path, unit: Unit) -> dict[str, Mapping[str, Counts]]:
    """Probes of the unit that some process finished, with their counts."""
    found: dict[str, Mapping[str, Counts]] = {}
    for path in report_files(processes, unit):
        for probe, counts in read_report(path).probes.items():
            if probe in unit.probes:
                found.setdefault(probe, counts)
    return found


def _collect(plan: ScanPlan, processes: Path, failures: Mapping[str, str]) -> tuple[ProbeResult, ...]:
    rows: list[ProbeResult] = []
    for unit in plan.units:
        done = finished_probes(processes, unit)
        for probe in unit.probes:
            primary = plan.detectors[probe]
            if probe in done:
                rows.append(ProbeResult(unit.area, probe, "run", primary, done[probe]))
            else:
                rows.append(ProbeResult(unit.area, probe, "failed", primary, {}, failures[probe]))
    rows += [
        ProbeResult(each.area, each.probe, "skipped", plan.detectors[each.probe], {}, each.reason)
        for each in plan.skipped
    ]
    return tuple(rows)


def _require_answer(target: Target) -> None:
    parts = urllib.parse.urlsplit(target.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=30).close()
    except OSError as error:
        raise Nemotron4Error(
            f"{target.url} does not answer: {error.strerror or error}",
            hint="start it and repeat the command: what was finished is kept",
        ) from error
