"""Two results side by side: may they be compared, and do they differ beyond chance? What flipped, and why?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron4.errors import DataError
from nemotron4.evaluation.result import Result
from nemotron4.evaluation.scoring import RESPONSES_FILE, ItemResponse
from nemotron4.grading.statistics import PairedTest, mcnemar, sign_flips
from nemotron4.json_form import to_json
from nemotron4.records import JsonObject
from nemotron4.report import Block, Folded, Heading, Table, Text
from nemotron4.runs import read_rows

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


FLIPS = 10  # of each kind, per benchmark
SHOWN_CHARACTERS = 4000
ALPHA = 0.05


def versus_blocks(results: Sequence[tuple[Path, Result]]) -> list[Block]:
    """The first result of every benchmark against each later one; nothing if no benchmark was run twice."""
    by_task: dict[str, list[tuple[Path, Result]]] = {}
    for folder, result in results:
        by_task.setdefault(result.task, []).append((folder, result))
    pairs = [(each[0], other) for each in by_task.values() for other in each[1:]]
    if not pairs:
        return []
    rows: list[list[str]] = []
    verdicts: list[str] = []
    flips: list[Block] = []
    for (first_folder, first), (second_folder, second) in pairs:
        try:
            found = compare(first, second)
        except DataError as error:
            rows.append([first.task, "", _name(first), _name(second), error.message, "", "", ""])
            continue
        rows += _rows(found)
        if not found.differences:
            verdicts.append(_verdict(found))
            flips += _flips(found, first_folder, second_folder)
    columns = ["benchmark", "metric", "A", "B", "B - A, 95 % interval", "p", "items", "left out"]
    return [
        Heading("Is B better than A?"),
        *(Text(verdict, is_verdict=True) for verdict in verdicts),
        Table(columns, rows),
        _reasons([result for pair in pairs for _, result in pair]),
        *flips,
    ]


def _name(result: Result) -> str:
    return result.model or "not named"


def _rows(found: PairedComparison) -> list[list[str]]:
    first, second = found.first, found.second
    if found.differences:
        why = "not comparable: " + ", ".join(found.differences)
        return [[first.task, "", _name(first), _name(second), why, "", "", ""]]
    rows = []
    for name, test in sorted(
        found.tests.items(), key=lambda entry: [*first.metrics, entry[0]].index(entry[0])
    ):
        scale = 100 if _are_shares(first, name) or _are_shares(second, name) else 1
        span = f"[{scale * test.interval.lower:+.2f}, {scale * test.interval.upper:+.2f}]"
        values = [_shown(result, name) for result in (first, second)]
        rows.append(
            [
                first.name,
                name,
                *(f"{_name(r)}: {value}" for r, value in zip((first, second), values, strict=True)),
                f"{scale * test.difference:+.2f} {span}",
                f"{test.p_value:.4f}, {test.method}",
                str(test.num_items),
                str(len(found.left_out[name])),
            ]
        )
    return rows


def _are_shares(result: Result, metric: str) -> bool:
    """Whether items have shares of 1 where the metric is in percent, as it is told by their mean. Without a
    metric of that name (own tasks) they are shares if each is right or wrong.
    """
    items = [value for item in result.items.values() if (value := item.get(metric)) is not None]
    value = result.metrics[metric].value if metric in result.metrics else None
    if value is None or not items:
        return bool(items) and {*items} <= {0.0, 1.0}
    mean = sum(items) / len(items)
    return abs(100 * mean - value) < abs(mean - value)


def _shown(result: Result, metric: str) -> str:
    value = result.metrics[metric].value if metric in result.metrics else None
    return "-" if value is None else f"{value:.2f}"


def _main_metric(found: PairedComparison) -> str:
    """The benchmark's first metric that is known by item."""
    return next((name for name in found.first.metrics if name in found.tests), next(iter(found.tests)))


def _verdict(found: PairedComparison) -> str:
    name = _main_metric(found)
    test = found.tests[name]
    who = f"{found.first.name}, {name}: {_name(found.second)} "
    if test.p_value >= ALPHA:
        return f"{who}does not differ from {_name(found.first)} beyond chance (p {test.p_value:.3f})."
    better = "better" if test.difference > 0 else "worse"
    return f"{who}is {better} than {_name(found.first)} (p {test.p_value:.3g}, {test.num_items} items)."


def _flips(found: PairedComparison, first: Path, second: Path) -> list[Block]:
    """The first items that B won or lost, with both answers."""
    name = _main_metric(found)
    groups = (("won", found.won[name]), ("lost", found.lost[name]))
    if not any(items for _, items in groups):
        return []
    answers = [_answers(folder) for folder in (first, second)]
    blocks: list[Block] = [Heading(f"Flips of {found.first.name}, {name}", 3)]
    for word, items in groups:
        more = f"; the first {FLIPS}" if len(items) > FLIPS else ""
        blocks.append(Text(f"{_name(found.second)} {word} {len(items)}{more}:"))
        for item in items[:FLIPS]:
            sides = zip("AB", (found.first, found.second), answers, strict=True)
            texts = [
                (f"{side}, {_name(result)}{_why(result, item)}", texts.get(item, "the answer is not on disk"))
                for side, result, texts in sides
            ]
            blocks.append(Folded(f"{word}: {item}", texts))
    return blocks


def _why(result: Result, item: str) -> str:
    return f" ({result.reasons[item]})" if item in result.reasons else ""


def _answers(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in read_rows(folder / RESPONSES_FILE):
        text = "\n\n".join(ItemResponse.of_row(row).texts)
        if len(text) > SHOWN_CHARACTERS:
            more = len(text) - SHOWN_CHARACTERS
            text = f"{text[:SHOWN_CHARACTERS]}\n... {more:,} more characters"
        found.setdefault(str(row["id"]), text)
    return found


def _reasons(results: Sequence[Result]) -> Table:
    """Why items have their scores, and what the answers cost."""
    rows = []
    for result in {id(result): result for result in results}.values():
        usage = result.usage
        counts = sorted(result.to_json()["reasons"].items(), key=lambda pair: -pair[1])
        shown = ", ".join(f"{count} {reason}" for reason, count in counts[:8]) or "none"
        tokens = f"{usage.get('prompt_tokens', 0):,.0f} + {usage.get('completion_tokens', 0):,.0f}"
        rows.append([result.name, _name(result), shown, tokens, f"{usage.get('duration_s', 0):,.0f}"])
    return Table(["benchmark", "model", "reasons", "tokens in + out", "request seconds"], rows)
