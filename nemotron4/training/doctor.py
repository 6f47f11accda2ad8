"""Every row of a data file examined as training would read it, before any training."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

from nemotron4.checkpoint import open_checkpoint
from nemotron4.json_form import to_json
from nemotron4.report import Bar, Bars, Block, Heading, Table, Text
from nemotron4.training.encoding import Encoder, Problem, ReadRow, RowKind, sample_hash
from nemotron4.training.inputs import encode_rows
from nemotron4.training.reading import Ignored, TrainingSource, read_rows
from nemotron4.training.samples import Sample

NUM_GRAM_WORDS = 13  # a text with a run of so many words of a benchmark has seen it
NUM_BARS = 12


@dataclass(frozen=True)
class Finding:
    """Something a person should know about a row that can still train. ``topic`` groups the summary."""

    where: str
    topic: str
    message: str


@dataclass
class Examination:
    """What the files hold. ``clean`` are the raw rows without problem and not seen before."""

    encoder: Encoder
    about: str = ""
    benchmarks: Sequence[Path] = ()
    num_rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    clean: list[object] = field(default_factory=list)
    ignored: Ignored = field(default_factory=Ignored)
    numbers: dict[str, list[float]] = field(default_factory=dict)

    @property
    def summary(self) -> dict[str, int]:
        topics = Counter(finding.topic for finding in self.findings)
        lengths = [len(segment.tokens) for sample in self.samples for segment in sample.segments]
        trained = sum(segment.num_trained for sample in self.samples for segment in sample.segments)
        return {
            "rows": self.num_rows,
            "usable": len(self.samples),
            "bad": len(self.problems),
            **dict(sorted(topics.items())),
            "tokens": sum(lengths),
            "trained_tokens": trained,
            "longest": max(lengths, default=0),
        }

    def to_json(self) -> dict[str, object]:
        return {
            "summary": self.summary,
            "ignored": {file: list(names) for file, names in self.ignored.columns.items()},
            "problems": to_json(self.problems),
            "warnings": to_json(self.findings),
        }

    def warnings(self) -> Iterator[str]:
        """One line for each topic: the first place, and how often it is found."""
        first: dict[str, Finding] = {}
        for finding in self.findings:
            first.setdefault(finding.topic, finding)
        counts = Counter(finding.topic for finding in self.findings)
        for topic, finding in first.items():
            more = f" (and {counts[topic] - 1:,} more rows)" if counts[topic] > 1 else ""
            yield f"{finding.where}: {finding.message}{more}"


def examine(
    sources: Sequence[TrainingSource],
    kind: RowKind,
    model: str,
    *,
    max_length: int | None = None,
    benchmarks: Sequence[Path] = (),
) -> Examination:
    """Read, render and tokenize every row with the model's own tokenizer and format; weights stay on disk.

    Texts of ``benchmarks`` that a row repeats are findings.
    """
    checkpoint = open_checkpoint(model)
    encoder = Encoder(
        checkpoint.tokenizer(),
        checkpoint.prompt_format(),
        max_length or checkpoint.config.context_length,
        bos_id=checkpoint.bos_token_id if checkpoint.adds_bos else None,
    )
    files = ", ".join(source.path for source in sources)
    about = f"{files}: rows of kind {kind.name}, with the tokenizer and the prompt format of {model}"
    found = Examination(encoder, about, benchmarks)
    first_seen: dict[str, str] = {}
    grams = _grams_of(benchmarks)

    def on_row(read: ReadRow, sample: Sample) -> None:
        topics = [*kind.findings(read.row, sample, encoder)]
        earlier = first_seen.setdefault(sample_hash(sample), sample.where)
        if earlier == sample.where:
            found.clean.append(read.raw)
        else:
            topics.append(("duplicates", f"the same as {earlier}"))
        if grams and (seen := next((g for g in _word_grams(_all_text(read.raw)) if g in grams), None)):
            topics.append(("contamination", f"{NUM_GRAM_WORDS} words as in {grams[seen]}"))
        found.findings += [Finding(sample.where, topic, message) for topic, message in topics]
        trained = sum(segment.num_trained for segment in sample.segments)
        lengths = {"tokens": sample.num_tokens, "trained tokens": trained}
        for name, value in (lengths | dict(kind.numbers(read.row))).items():
            found.numbers.setdefault(name.replace("_", " "), []).append(float(value))

    for source in sources:
        for each in encode_rows(read_rows(source, kind, found.ignored), kind, encoder, on_row):
            found.num_rows += 1
            if isinstance(each, Problem):
                found.problems.append(each)
            else:
                found.samples.append(each)
    found.problems.sort(key=lambda problem: _place(problem.where))
    return found


# ---- the report


def report(found: Examination) -> list[Block]:
    """How lengths, turns and rewards are distributed, and what is wrong where and how often."""
    summary = found.summary
    verdict = f"{summary['usable']:,} of {summary['rows']:,} rows can train"
    blocks: list[Block] = [Heading("Training data"), Text(verdict, is_verdict=True), Text(found.about)]
    first = {finding.topic: f"{finding.where}: {finding.message}" for finding in reversed(found.findings)}
    if found.problems:
        first["bad"] = str(found.problems[0])
    searched = ", ".join(map(str, found.benchmarks))
    first.setdefault(
        "contamination", f"compared with {searched}" if searched else "not looked for: --benchmark"
    )
    counts = {"bad": 0, "duplicates": 0, "contamination": 0} | Counter(f.topic for f in found.findings)
    counts["bad"] = len(found.problems)
    rows = [(name.replace("_", " "), f"{n:,}", first.get(name, "")) for name, n in counts.items()]
    blocks.append(Table(("what is wrong", "rows", "the first"), rows))
    measured = [(name, values) for name, values in found.numbers.items() if len(values) > 1]
    columns = ("", "lowest", "5 %", "median", "95 %", "highest", "mean")
    blocks.append(Table(columns, [_distribution(name, values) for name, values in measured]))
    blocks += [histogram(name, values) for name, values in measured if min(values) < max(values)]
    blocks += [Text(line) for line in found.ignored.lines()]
    return blocks


def _distribution(name: str, values: Sequence[float]) -> tuple[str, ...]:
    cuts = quantiles(values, n=20)
    found = (min(values), cuts[0], cuts[9], cuts[18], max(values), sum(values) / len(values))
    return (name, *(f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}" for value in found))


def histogram(name: str, values: Sequence[float]) -> Bars:
    """Rows by value: one bar for each of a few whole numbers, else for each of equal spans."""
    whole = Counter(values)
    if len(whole) <= NUM_BARS:
        bars = [(f"{value:g}", count) for value, count in sorted(whole.items())]
    else:
        size = _round_size((max(values) - min(values)) / NUM_BARS)
        places = Counter(math.floor(value / size) for value in values)
        bars = [
            (f"{place * size:,.12g} to {(place + 1) * size:,.12g}", places[place])
            for place in range(min(places), max(places) + 1)
        ]
    return Bars(
        name.capitalize(), "rows", [Bar(label, float(count), label=f"{count:,}") for label, count in bars]
    )


def _round_size(least: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... and their tenths."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


# ---- contamination


def _grams_of(benchmarks: Sequence[Path]) -> dict[tuple[str, ...], str]:
    """Runs of words in benchmark files (JSON lines), and where each is from."""
    from nemotron4.records import numbered_lines

    found: dict[tuple[str, ...], str] = {}
    for path in benchmarks:
        for number, line in numbered_lines(path):
            if line.strip():
                text = _all_text(json.loads(line) if line.lstrip().startswith("{") else line)
                for gram in _word_grams(text):
                    found.setdefault(gram, f"{path}:{number}")
    return found


def _word_grams(text: str) -> Iterator[tuple[str, ...]]:
    words = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    return (tuple(words[i : i + NUM_GRAM_WORDS]) for i in range(len(words) - NUM_GRAM_WORDS + 1))


def _all_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "\n".join(_all_text(entry) for entry in value.values())
    return "\n".join(_all_text(entry) for entry in value) if isinstance(value, list) else ""


def _place(where: str) -> tuple[str, int]:
    path, _, line = where.rpartition(":")
    return path, int(line) if line.isdigit() else 0
