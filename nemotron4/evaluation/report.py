"""The report of runs: the card's tables with ours next to them, plots, provenance, links to samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from nemotron4.errors import DataError
from nemotron4.evaluation import published
from nemotron4.evaluation.compare import versus_blocks
from nemotron4.evaluation.failures import MISSING
from nemotron4.evaluation.result import RESULT_FILE, Result, fraction, load_result, number
from nemotron4.evaluation.scoring import SAMPLES_FILE
from nemotron4.plots import draw_bar_panels, draw_radar
from nemotron4.records import read_json_lines
from nemotron4.report import Bar, Bars, Block, Heading, Links, Picture, Table, Text
from nemotron4.report import write_report as write_files

LINKS_PER_TASK = 10
VIEWER = "http://127.0.0.1:7575"
PUBLISHED = "published"
CARD = f"{published.CARD_MODEL} (card)"


@dataclass(frozen=True)
class Found:
    """A result and where it lies."""

    folder: Path
    result: Result
    place: str = ""  # tells models of one name apart

    @property
    def model(self) -> str:
        name = self.result.model or self.folder.resolve().parent.name
        return f"{name} ({self.place})" if self.place else name

    @property
    def star(self) -> str:
        """Marks a value that is not of the whole benchmark: a sample, other data, or answers missing."""
        missing = any(reason.startswith(MISSING) for reason in self.result.unscored)
        is_part = self.result.limit is not None or not self.result.data_is_standard or missing
        return "*" if is_part else ""


def find_results(folders: Sequence[Path]) -> list[Found]:
    """Every result below the folders. Runs that have none yet are an error: they would be missing unseen."""
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        places = (
            [folder] if (folder / RESULT_FILE).exists() else sorted(p for p in folder.iterdir() if p.is_dir())
        )
        results = [Found(place, load_result(place)) for place in places if (place / RESULT_FILE).exists()]
        unfinished = [p for p in places if (p / "run.json").exists() and not (p / RESULT_FILE).exists()]
        if unfinished:
            raise DataError(f"{unfinished[0]}: the run has no result yet", hint="run the same command again")
        if not results:
            raise DataError(f"{folder}: no {RESULT_FILE} in it or one level below")
        found += results
    return _told_apart(list({one.folder.resolve(): one for one in found}.values()))


def _told_apart(found: list[Found]) -> list[Found]:
    """Where a benchmark has two results of one name, the run's folder is added to it, or else the path."""
    for place in (lambda one: one.folder.resolve().parent.name, lambda one: str(one.folder)):
        counts = Counter((one.model, one.result.name) for one in found)
        twice = {model for (model, _), count in counts.items() if count > 1}
        found = [replace(one, place=place(one)) if one.model in twice else one for one in found]
    return found


def value_of(found: Sequence[Found], model: str, task: str, metric: str) -> Found | None:
    """The model's result under exactly this task's definition that has the metric, or None."""
    for one in found:
        if one.model == model and one.result.name == task and metric in one.result.metrics:
            return one
    return None


def _models(found: Sequence[Found]) -> list[str]:
    return list(dict.fromkeys(one.model for one in found))


def _shown(one: Found | None, metric: str) -> str:
    """Value, interval, and the star of what is not the whole benchmark."""
    if one is None:
        return ""
    entry = one.result.metrics[metric]
    text = number(entry.value)
    if entry.interval is not None:
        text += f" [{entry.interval.lower:.1f}, {entry.interval.upper:.1f}]"
    return text + one.star


def _printed(value: float | None, metric: str) -> str:
    """A published value with the decimals of its source: two for ratings, one for shares."""
    return "-" if value is None else f"{value:.2f}" if metric == "total" else f"{value:.1f}"


def _peer_table(
    found: Sequence[Found], table: Mapping[tuple[str, str, str], published.Row], peers: Sequence[str]
) -> Table:
    models = _models(found)
    rows = []
    for (task, metric, label), values in table.items():
        ours = [_shown(value_of(found, model, task, metric), metric) for model in models]
        rows.append([label, *ours, *(_printed(value, metric) for value in values)])
    return Table(["", *(f"{model} (ours)" for model in models), *peers], rows)


def _mt_bench_table(found: Sequence[Found]) -> Table:
    rows = [
        [f"{published.CARD_MODEL} (card)", *(_printed(value, "total") for value in published.MT_BENCH_CARD)]
    ]
    for one in found:
        if one.result.task == "mt_bench":
            metrics = one.result.metrics
            cells = [number(metrics[c].value) if c in metrics else "" for c in published.MT_BENCH_COLUMNS]
            rows.append([f"{one.model}, {one.result.name}", *cells])
    return Table(["", *(name.replace("_", " ") for name in published.MT_BENCH_COLUMNS)], rows)


def _stage_table(found: Sequence[Found]) -> Table:
    metrics = [metric for _, metric, _ in published.STAGE_COLUMNS]
    rows = [
        [stage, *(_printed(value, metric) for value, metric in zip(values, metrics, strict=True))]
        for stage, values in published.STAGES.items()
    ]
    for model in _models(found):
        ours = [value_of(found, model, task, metric) for task, metric, _ in published.STAGE_COLUMNS]
        cells = [_shown(one, column[1]) for one, column in zip(ours, published.STAGE_COLUMNS, strict=True)]
        if any(cells):
            rows.append([f"{model} (ours)", *cells])
    return Table(["", *(label for *_, label in published.STAGE_COLUMNS)], rows)


def _every_metric(found: Sequence[Found]) -> Table:
    rows = []
    for one in found:
        for name, metric in one.result.metrics.items():
            interval = metric.interval
            shown = (
                "" if interval is None else f"[{interval.lower:.2f}, {interval.upper:.2f}] {interval.method}"
            )
            reasons = ", ".join(f"{count} {reason}" for reason, count in one.result.unscored.items())
            rows.append(
                [
                    one.result.name,
                    one.model,
                    name,
                    number(metric.value),
                    shown,
                    fraction(metric),
                    reasons or "0",
                ]
            )
    return Table(["benchmark", "model", "metric", "value", "95 % interval", "fraction", "unscored"], rows)


def _provenance(found: Sequence[Found]) -> Table:
    rows = []
    for one in found:
        result, usage = one.result, one.result.usage
        tokens = f"{usage.get('prompt_tokens', 0):g} + {usage.get('completion_tokens', 0):g}"
        rows.append(
            [
                result.name,
                one.model,
                result.judge or "-",
                f"{result.num_items}" + (f" (sample, seed {result.seed})" if result.limit else ""),
                result.data_sha256[:12] + ("" if result.data_is_standard else " (not the standard file)"),
                result.prompt_sha256[:12],
                result.grader_sha256[:12],
                json.dumps(dict(result.sampling)),
                result.seed,
                result.isolation or "-",
                tokens,
                f"{usage.get('duration_s', 0):.0f}",
                result.created_at[:16].replace("T", " "),
            ]
        )
    columns = ["benchmark", "model", "judge", "items", "data sha256", "prompt sha256", "grader sha256"]
    return Table(
        [*columns, "sampling", "seed", "isolation", "tokens in + out", "request seconds", "UTC"], rows
    )


def _sample_links(one: Found) -> Links | None:
    """The first items that scored lowest, in the viewer started on the run's logs."""
    path = one.folder / SAMPLES_FILE
    if not path.exists():
        return None
    log_of = {name: row["log"] for _, row in read_json_lines(path) for name in row["ids"]}
    scored = {
        name: sum(v for v in values.values() if v is not None)
        for name, values in one.result.items.items()
        if name in log_of
    }
    lowest = sorted(scored, key=lambda name: scored[name])[:LINKS_PER_TASK]
    links = [
        (name, f"{VIEWER}/#/logs/{log_of[name]}/samples/sample/{quote(name, safe='')}/1/") for name in lowest
    ]
    return Links(links) if links else None


def _base_blocks(found: Sequence[Found]) -> list[Block]:
    """The base models' table, if one of its benchmarks was run."""
    if not {one.result.task for one in found} & {task for task, *_ in published.BASE_TABLE}:
        return []
    table = _peer_table(found, published.BASE_TABLE, published.BASE_PEERS)
    return [Heading("Base models"), table]


def report_blocks(found: Sequence[Found], pictures: Sequence[Picture]) -> list[Block]:
    blocks: list[Block] = [
        Heading("Benchmark report", 1),
        Text(
            "Columns and rows marked (ours) were measured; all others are printed by the technical report and"
            " the model card. A star marks a sample of the benchmark, missing answers or another data file. A"
            " value inside another's interval is consistent with it, not equal to it."
        ),
        *versus_blocks([(one.folder, one.result) for one in found]),
        Heading("Benchmarks next to the published ones"),
        _peer_table(found, published.PEER_TABLE, published.PEERS),
        *_base_blocks(found),
        Heading("MT-Bench by category"),
        _mt_bench_table(found),
        *pictures,
        Heading("Alignment stages"),
        Text("Published stages of the 340B model, and the measured models in the same columns."),
        _stage_table(found),
        Heading("Every metric"),
        _every_metric(found),
        Heading("Where the numbers come from"),
        _provenance(found),
    ]
    notes = [(one.result.name, note) for one in found for note in one.result.notes]
    if notes:
        blocks += [Heading("Notes"), Table(["benchmark", "note"], [list(note) for note in notes])]
    for one in found:
        if (links := _sample_links(one)) is not None:
            blocks += [
                Heading(f"Lowest-scored samples of {one.result.name}, {one.model}", 3),
                Text(f"Start the viewer first: inspect view --log-dir {one.folder / 'logs'}"),
                links,
            ]
    return blocks


def draw_all(found: Sequence[Found], out: Path) -> list[tuple[Path, str]]:
    """The plots that the results allow, with their captions."""
    drawn = []
    if any(one.result.task == "mt_bench" for one in found):
        drawn.append((_radar(found, out / "mt_bench.png"), "MT-Bench by category"))
    rows = [key for key in published.PEER_TABLE if any(_ours(found, key))]
    if rows:
        panels = [_panel(key, _ours(found, key)) for key in rows]
        path = draw_bar_panels(
            panels, out / "benchmarks.png", muted=[PUBLISHED], num_columns=min(2, len(rows))
        )
        drawn.append((path, "Benchmarks with 95 % intervals"))
    return drawn


def _ours(found: Sequence[Found], key: tuple[str, str, str]) -> list[Found]:
    task, metric, _ = key
    models = dict.fromkeys(one.model for one in found)
    return [one for model in models if (one := value_of(found, model, task, metric)) is not None]


def _radar(found: Sequence[Found], path: Path) -> Path:
    categories = published.MT_BENCH_COLUMNS[:8]
    series: dict[str, Sequence[float | None]] = {CARD: published.MT_BENCH_CARD[:8]}
    for one in found:
        if one.result.task == "mt_bench":
            metrics = one.result.metrics
            values = [metrics[name].value if name in metrics else None for name in categories]
            series[f"{one.model}, {one.result.name}"] = values
    return draw_radar(categories, series, path, title="MT-Bench by category, judge's rating of 10", limit=10)


def _panel(key: tuple[str, str, str], ours: Sequence[Found]) -> Bars:
    """Ours first, then every published value of this benchmark."""
    _, metric, label = key
    limit, form, unit = (10, ".2f", "rating of 10") if metric == "total" else (100, ".1f", "%")
    bars = []
    for one in ours:
        entry = one.result.metrics[metric]
        if entry.value is not None:
            span = entry.interval
            low, high = (None, None) if span is None else (span.lower, span.upper)
            text, name = f"{entry.value:{form}}", f"{one.model} {one.star}".rstrip()
            bars.append(Bar(name, entry.value, low, high, text, one.model))
    for peer, value in zip(published.PEERS, published.PEER_TABLE[key], strict=True):
        if value is not None:
            series = CARD if peer == published.CARD_MODEL else PUBLISHED
            bars.append(Bar(peer, value, label=f"{value:{form}}", series=series))
    return Bars(label, unit, bars, limit=limit)


def write_report(folders: Sequence[Path], out: Path) -> list[Path]:
    """Write ``report.md``, ``report.html`` and the plots into ``out``; returns what was written."""
    found = find_results(folders)
    out.mkdir(parents=True, exist_ok=True)
    pictures = [Picture(path.name, caption) for path, caption in draw_all(found, out)]
    written = write_files(out, "Benchmark report", report_blocks(found, pictures))
    return [*written, *(out / picture.path for picture in pictures)]
