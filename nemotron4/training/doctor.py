"""Every row of a data file examined as training would read it, before any training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron4.checkpoint import open_checkpoint
from nemotron4.training.data import (
    Encoder,
    build_samples,
    judged_samples,
    pair_sample,
    reward_pair_sample,
    sample_hash,
    scored_sample,
    sft_sample,
)
from nemotron4.training.formats import ALL_ATTRIBUTES, AnswerRow, JudgedRow, Kind, PairRow
from nemotron4.training.packing import Sample
from nemotron4.training.reading import Problem, ReadRow, read_rows

KINDS: tuple[Kind, ...] = ("sft", "preference", "kto", "reward", "reward_pairs")


@dataclass(frozen=True)
class Finding:
    """Something a person should know about a row that can still train. ``topic`` groups the summary."""

    where: str
    topic: str
    message: str


@dataclass(frozen=True)
class Examination:
    """What the file holds. ``clean`` are the raw rows without problem and not seen before."""

    num_rows: int
    problems: tuple[Problem, ...]
    findings: tuple[Finding, ...]
    samples: tuple[Sample, ...]
    clean: tuple[object, ...]
    encoder: Encoder

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


def examine(paths: Sequence[Path], kind: Kind, model: str, *, max_length: int | None = None) -> Examination:
    """Read, render and tokenize every row with the model's own tokenizer and format; weights stay on disk."""
    checkpoint = open_checkpoint(model)
    encoder = Encoder(
        checkpoint.tokenizer(),
        checkpoint.prompt_format(),
        max_length or checkpoint.config.context_length,
        bos_id=checkpoint.bos_token_id if checkpoint.adds_bos else None,
    )
    rows, problems = read_rows(paths, kind)
    samples, more = _samples(rows, kind, encoder)
    by_place = {read.where: read for read in rows}
    findings: list[Finding] = []
    first_seen: dict[str, str] = {}
    clean: list[object] = []
    for sample in samples:
        read = by_place[sample.where]
        findings += _findings(read, sample, kind, encoder)
        earlier = first_seen.setdefault(sample_hash(sample), sample.where)
        if earlier == sample.where:
            clean.append(read.raw)
        else:
            findings.append(Finding(sample.where, "duplicates", f"the same as {earlier}"))
    total = len(rows) + len(problems)
    everything = sorted((*problems, *more), key=lambda problem: _place(problem.where))
    return Examination(total, tuple(everything), tuple(findings), tuple(samples), tuple(clean), encoder)


def _samples(rows: Sequence[ReadRow], kind: Kind, encoder: Encoder) -> tuple[list[Sample], list[Problem]]:
    if kind == "kto":
        return judged_samples(rows, encoder)
    builders = {
        "sft": sft_sample(encoder),
        "preference": pair_sample(encoder, needs_rewards=False),
        "reward": scored_sample(encoder, ALL_ATTRIBUTES, trained=ALL_ATTRIBUTES),
        "reward_pairs": reward_pair_sample(encoder, needs_strength=False),
    }
    return build_samples(rows, encoder, builders[kind])


def _findings(read: ReadRow, sample: Sample, kind: Kind, encoder: Encoder) -> list[Finding]:
    found: list[Finding] = []
    row = read.row

    def add(topic: str, message: str) -> None:
        found.append(Finding(read.where, topic, message))

    if kind not in ("reward", "reward_pairs") and not _trains_stop(sample, encoder):
        add("never_stops", "no stop marker is trained, so the model would not learn to end")
    if isinstance(row, PairRow) and kind == "preference":
        if row.chosen_reward is None or row.rejected_reward is None:
            add("without_rewards", "no rewards: loss rpo would refuse the row")
        elif row.chosen_reward < row.rejected_reward:
            add("inverted_rewards", f"chosen has {row.chosen_reward:g}, rejected {row.rejected_reward:g}")
        elif row.chosen_reward == row.rejected_reward:
            add("equal_rewards", f"both answers have reward {row.chosen_reward:g}")
    for prompt, answer in _plain_texts(row):
        together = encoder.tokenizer.encode(prompt + answer)
        apart = encoder.tokenizer.encode(prompt)
        apart += encoder.tokenizer.encode(answer, continues=bool(apart))
        if together != apart:
            add("merging_boundary", "prompt and answer merge into other tokens where they meet")
            break
    return found


def _trains_stop(sample: Sample, encoder: Encoder) -> bool:
    stops = encoder.stop_ids()
    return all(
        any(is_trained and token in stops for token, is_trained in zip(s.tokens, s.is_trained, strict=True))
        for s in sample.segments
    )


def _plain_texts(row: object) -> list[tuple[str, str]]:
    """Rendered prompts with their answers: rows of messages are cut by the format and cannot merge."""
    if isinstance(row, AnswerRow | JudgedRow) and isinstance(row.prompt, str):
        return [(row.prompt, row.answer)]
    if isinstance(row, PairRow) and isinstance(row.prompt, str):
        return [(row.prompt, row.chosen), (row.prompt, row.rejected)]
    return []


def _place(where: str) -> tuple[str, int]:
    path, _, line = where.rpartition(":")
    return path, int(line) if line.isdigit() else 0
