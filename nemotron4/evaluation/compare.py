"""Two results side by side: may they be compared, and do they differ beyond chance?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nemotron4.errors import DataError
from nemotron4.evaluation.result import Result
from nemotron4.grading.statistics import PairedTest, mcnemar, sign_flips
from nemotron4.json_form import to_json
from nemotron4.records import JsonObject
from nemotron4.report import Block, Table, Text

PAGE_LENGTH = 10


@dataclass(frozen=True)
class PairedComparison:
    """``differences`` name what forbids the comparison; tests and flips are there only without any.

    ``left_out``: items that only one of the results scored, by metric.
    """

    first: Result
    second: Result
    differences: Mapping[str, tuple[object, object]]
    tests: Mapping[str, PairedTest]
    won: Mapping[str, list[str]]
    lost: Mapping[str, list[str]]
    left_out: Mapping[str, list[str]]

    def to_json(self) -> JsonObject:
        return {
            "task": self.first.task,
            "comparable": not self.differences,
            "differences": {name: list(pair) for name, pair in self.differences.items()},
            "metrics": {
                name: [self.first.metrics[name].value, metric.value]
                for name, metric in self.second.metrics.items()
                if name in self.first.metrics
            },
            "tests": to_json(self.tests),
            "won": dict(self.won),
            "lost": dict(self.lost),
            "left_out": dict(self.left_out),
        }


def compare(first: Result, second: Result) -> PairedComparison:
    """Paired tests per metric over the items that both results scored; only if their definitions agree."""
    if first.task != second.task:
        raise DataError(f"{first.task} cannot be compared with {second.task}")
    theirs = second.identity()
    differences = {
        name: (value, theirs[name]) for name, value in first.identity().items() if value != theirs[name]
    }
    tests: dict[str, PairedTest] = {}
    won: dict[str, list[str]] = {}
    lost: dict[str, list[str]] = {}
    left_out: dict[str, list[str]] = {}
    if not differences:
        for metric in sorted({name for values in first.items.values() for name in values}):
            names = dict.fromkeys((*first.items, *second.items))
            both = [
                (n, first.items.get(n, {}).get(metric), second.items.get(n, {}).get(metric)) for n in names
            ]
            pairs = [(n, a, b) for n, a, b in both if a is not None and b is not None]
            left_out[metric] = [n for n, a, b in both if (a is None) != (b is None)]
            if not pairs:
                raise DataError(f"{first.task}: the results have no item with {metric} in common")
            tests[metric] = _test([(before, after) for _, before, after in pairs])
            won[metric] = [name for name, before, after in pairs if after > before]
            lost[metric] = [name for name, before, after in pairs if after < before]
    return PairedComparison(first, second, differences, tests, won, lost, left_out)


def _test(pairs: list[tuple[float, float]]) -> PairedTest:
    before, after = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if {*before, *after} <= {0.0, 1.0}:
        return mcnemar([value > 0 for value in before], [value > 0 for value in after])
    return sign_flips(before, after)


def comparison_blocks(comparison: PairedComparison) -> list[Block]:
    """For a reader. A difference inside the noise is called that."""
    first, second = comparison.first, comparison.second
    models = f"{first.task}: {first.model or 'first'} -> {second.model or 'second'}"
    if comparison.differences:
        rows = [[name, str(a), str(b)] for name, (a, b) in comparison.differences.items()]
        return [
            Text(f"{models}: not comparable", is_verdict=True),
            Table(["setting", "first", "second"], rows),
        ]
    rows, items = [], []
    for name, test in comparison.tests.items():
        verdict = "differ" if test.p_value < 0.05 else "no difference beyond chance"
        span = f"[{test.interval.lower:+.4f}, {test.interval.upper:+.4f}]"
        rows.append(
            [
                name,
                f"{test.difference:+.4f}",
                span,
                f"{test.p_value:.4f}",
                verdict,
                test.method,
                str(test.num_items),
            ]
        )
        groups = [("won", comparison.won[name]), ("lost", comparison.lost[name])]
        if comparison.left_out[name]:
            groups.append(("left out, scored by one only", comparison.left_out[name]))
        for word, names in groups:
            shown = ", ".join(names[:PAGE_LENGTH]) + (" ..." if len(names) > PAGE_LENGTH else "")
            items.append(Text(f"{name}, {word} {len(names)}" + (f": {shown}" if names else "")))
    columns = ["metric", "difference", "95 % interval", "p", "verdict", "test", "items"]
    return [Text(models, is_verdict=True), Table(columns, rows), *items]
