"""Results as lines of text."""

from __future__ import annotations

import json

from nemotron4.evaluation.registry import TASKS
from nemotron4.evaluation.result import Result
from nemotron4.evaluation.task import Metric


def number(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.2f}"


def fraction(metric: Metric) -> str:
    if metric.numerator is None or metric.denominator is None:
        return ""
    return f"{metric.numerator:g}/{metric.denominator:g}"


def result_lines(result: Result) -> list[str]:
    """The result for a reader: every metric with its interval, its fraction and the card's value."""
    card = TASKS[result.task].card if result.name == result.task else {}
    lines = [f"{result.name}: {result.num_items} items"]
    for name, metric in result.metrics.items():
        line = f"  {name:<20}{number(metric.value):>9}"
        if metric.interval is not None:
            line += f"  [{metric.interval.lower:.2f}, {metric.interval.upper:.2f}]"
        line += f"  {fraction(metric)}" if metric.numerator is not None else ""
        line += f"  card {card[name]:g}" if name in card else ""
        lines.append(line)
    reasons = ", ".join(f"{count} {reason}" for reason, count in result.unscored.items())
    lines.append(f"  unscored {sum(result.unscored.values())}" + (f" ({reasons})" if reasons else ""))
    if result.unparsed:
        lines.append(f"  unparsed {result.unparsed} (counted as wrong)")
    lines += [f"  {line}" for line in _provenance(result)]
    lines += [f"  note: {note}" for note in result.notes]
    return lines


def _provenance(result: Result) -> list[str]:
    """Who was measured, what it cost, and what must agree before two results are compared."""
    who = f"model {result.model or 'not named'}"
    who += f"; judge {result.judge or 'not named'}" if TASKS[result.task].judge is not None else ""
    who += f"; {json.dumps(dict(result.sampling))}" if result.sampling else ""
    who += f"; seed {result.seed}" + (f"; sample of {result.limit}" if result.limit else "")
    who += f"; code in {result.isolation}" if result.isolation else ""
    lines = [who]
    if result.usage:
        lines.append("; ".join(f"{name} {value:.6g}" for name, value in result.usage.items()))
    standard = "" if result.data_is_standard else " (not the standard file)"
    lines.append(
        f"sha256: data {result.data_sha256[:12]}{standard}, prompt {result.prompt_sha256[:12]},"
        f" grader {result.grader_sha256[:12]}"
    )
    return lines
